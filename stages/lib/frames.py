"""Where sensors sit: chains of static transforms, pieced together from all messages of a recording and the rig."""

from __future__ import annotations

from typing import Any

import numpy as np

from stages.lib import geometry
from stages.lib.errors import DataError

TOPIC = "/tf_static"


class Frames:
    """A forest of frames: child -> (parent, T_parent_child). A later transform of a child replaces the earlier one.

    num_replaced  how often a child came again with another parent or transform
    """

    def __init__(self) -> None:
        self._parents: dict[str, tuple[str, np.ndarray]] = {}
        self.num_replaced = 0

    def add(self, parent: str, child: str, T_parent_child: np.ndarray) -> None:
        """One transform (4, 4). Frame names lose the leading slash of ROS 1."""
        parent, child = parent.lstrip("/"), child.lstrip("/")
        known = self._parents.get(child)
        if known is not None and (known[0] != parent or not np.allclose(known[1], T_parent_child, atol=1e-6)):
            self.num_replaced += 1
        self._parents[child] = parent, T_parent_child

    def add_message(self, message: Any) -> None:
        """All transforms of a decoded tf2_msgs/TFMessage. Raises DataError for a rotation that is none."""
        for row in message.transforms:
            t, q = row.transform.translation, row.transform.rotation
            wxyz = np.array([q.w, q.x, q.y, q.z])
            if not (np.isfinite([t.x, t.y, t.z, *wxyz]).all() and abs(np.linalg.norm(wxyz) - 1) < 0.01):
                raise DataError(f"{TOPIC}: {row.header.frame_id} -> {row.child_frame_id} has the rotation (w x y z) "
                                f"{wxyz.tolist()}, expected a unit quaternion; state it in the rig: mounts")
            self.add(row.header.frame_id, row.child_frame_id, geometry.transform(np.array([t.x, t.y, t.z]), wxyz))

    def T(self, dst: str, src: str) -> np.ndarray | None:
        """T_dst_src (4, 4) along the chain that joins them; None where none does."""
        up_dst, up_src = self._chain(dst.lstrip("/")), self._chain(src.lstrip("/"))
        common = next((frame for frame in up_src if frame in up_dst), None)
        return None if common is None else geometry.invert(up_dst[common]) @ up_src[common]

    def T_ego(self, ego_frame: str, frame: str, topic: str, drive: str) -> np.ndarray:
        """T_ego_frame (4, 4) of the frame that a topic's messages name. Raises DataError where nothing joins them."""
        T_ego_frame, frame = self.T(ego_frame, frame), frame.lstrip("/")
        if T_ego_frame is None:
            raise DataError(f"{drive}: no transform joins {ego_frame} and {frame!r}, the frame of {topic}; frames: "
                            f"{', '.join(self.names()) or 'none'}\n"
                            f"  state T_ego_{frame} in conf/rig: mounts.{frame}, or correct ego_frame there")
        return T_ego_frame

    def names(self) -> list[str]:
        """All frames, sorted."""
        return sorted(self._parents.keys() | {parent for parent, _ in self._parents.values()})

    def _chain(self, frame: str) -> dict[str, np.ndarray]:
        """ancestor -> T_ancestor_frame, from the frame itself up."""
        chain, T = {frame: np.eye(4)}, np.eye(4)
        while frame in self._parents:
            frame, T_parent_child = self._parents[frame]
            if frame in chain:
                raise DataError(f"{TOPIC}: the frames {', '.join(sorted(chain))} go round in a circle; "
                                "state where they are in the rig: mounts")
            T = T_parent_child @ T
            chain[frame] = T
        return chain
