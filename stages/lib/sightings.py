"""What the sweeps of a scene show over the ground: in each sweep, what stands and what does not, as a table.

What stands is found in all sweeps together, what does not in each sweep by itself.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import polars as pl
from scipy.spatial import cKDTree

from stages.lib import clusters, firing, geometry, standing
from stages.lib.boxes import rotate
from stages.lib.clusters import Clustering
from stages.lib.standing import Standing, Things

COLUMN_M = 6.0  # nothing higher is looked at
BIG_M = 15.0  # longer things are walls and hedges
HOLDS_M = (8.0, 3.0)  # what is in the rectangle of a longer or wider thing need not belong to it
OWN_RANGE_M, OWN_CELL_M = 3.0, 0.2  # what is in the same cell so near the sensor,
OWN_SHARE, OWN_WAY_M = 0.6, 6.0  # in this share of the sweeps of so long a way, rides along
UPPER = 0.7  # of its height: what is over this is its upper part

# One row per sweep and thing in it, map frame.
#   thing        number of what stands in this place all the time; null for what does not
#   after_s      when its points were measured, on average, after the stamp
#   x_m … width_m, yaw_rad   rectangle around what was seen of it (not around all of it), length along yaw_rad
#   ground_z_m, top_m        the ground under it, its height over that
#   lean_m       how far its upper points lie from x_m, y_m, along yaw_rad
#   beside_share share of its points beside which something stands; 1 for what stands
#   outline_…    corners of its outline, from x_m, y_m, and when they were measured, after after_s
RAW = {"stamp_us": pl.Int64, "thing": pl.Int64, "after_s": pl.Float64, "x_m": pl.Float64, "y_m": pl.Float64,
       "ground_z_m": pl.Float64, "length_m": pl.Float64, "width_m": pl.Float64, "top_m": pl.Float64,
       "yaw_rad": pl.Float64, "lean_m": pl.Float64, "num_lidar_pts": pl.Int64, "beside_share": pl.Float64,
       "sensor_x_m": pl.Float64, "sensor_y_m": pl.Float64,
       "outline_dx_m": pl.List(pl.Float32), "outline_dy_m": pl.List(pl.Float32),
       "outline_after_s": pl.List(pl.Float32)}


@dataclass(frozen=True)
class Scan:
    """What one sweep shows over the ground, map frame.

    xyz_map (N, 3) [m] of points over the ground, height_m (N,) over it, after_s (N,) after the stamp; ground_xy (G, 2)
    [m] of points on the ground; T_map_sensor (4, 4).
    """

    stamp_us: int
    xyz_map: np.ndarray
    height_m: np.ndarray
    after_s: np.ndarray
    ground_xy: np.ndarray
    T_map_sensor: np.ndarray

    @property
    def sensor_xy(self) -> np.ndarray:
        """Where the lidar is (2,) [m], map frame."""
        return self.T_map_sensor[:2, 3]


@dataclass(frozen=True)
class Sightings:
    """Rows of the table RAW as arrays, map frame.

    stamps_s    (H,) of the sweeps, since some begin; times_s (H,) when its points were measured
    thing       (H,) int: number of the standing thing, -1 for none
    centre_xy   (H, 2) [m] of the rectangles around what was seen, yaw_rad (H,) and longer side
                long_m (H,) [m] of those, lean_m (H,) as in RAW
    outlines    (H,) of arrays (K, 3): xy [m] and when measured, after times_s
    sensor_xy   (H, 2) [m]
    ground_z_m  (H,) under it; top_m (H,) over that
    num_points  (H,); beside_share (H,) as in RAW
    """

    stamps_s: np.ndarray
    times_s: np.ndarray
    thing: np.ndarray
    centre_xy: np.ndarray
    yaw_rad: np.ndarray
    long_m: np.ndarray
    lean_m: np.ndarray
    outlines: np.ndarray
    sensor_xy: np.ndarray
    ground_z_m: np.ndarray
    top_m: np.ndarray
    num_points: np.ndarray
    beside_share: np.ndarray

    def take(self, rows: np.ndarray) -> Sightings:
        """Those rows (K,) int, in this order."""
        return Sightings(**{f.name: getattr(self, f.name)[rows] for f in fields(self)})


def of_rows(raw: pl.DataFrame, begin_us: int) -> Sightings:
    """The rows of a table RAW."""
    outlines = np.empty(len(raw), object)
    names = ("outline_dx_m", "outline_dy_m", "outline_after_s", "x_m", "y_m")
    for row, (dx, dy, after_s, x, y) in enumerate(raw.select(names).iter_rows()):
        outlines[row] = np.column_stack([np.add(dx, x), np.add(dy, y), after_s])
    column = {name: raw[name].to_numpy() for name in RAW if not name.startswith(("outline", "thing"))}
    stamps_s = (column["stamp_us"] - begin_us) / 1e6
    return Sightings(
        stamps_s=stamps_s, times_s=stamps_s + column["after_s"], thing=raw["thing"].fill_null(-1).to_numpy(),
        centre_xy=raw.select("x_m", "y_m").to_numpy(), yaw_rad=column["yaw_rad"],
        long_m=np.maximum(column["length_m"], column["width_m"]), lean_m=column["lean_m"],
        outlines=outlines, sensor_xy=raw.select("sensor_x_m", "sensor_y_m").to_numpy(),
        ground_z_m=column["ground_z_m"], top_m=column["top_m"], num_points=column["num_lidar_pts"],
        beside_share=column["beside_share"])


def scan(stamp_us: int, xyz_sensor: np.ndarray, T_map_ego: np.ndarray, T_ego_sensor: np.ndarray, *,
         turn_s: float, cfg: Clustering) -> Scan:
    """The scan of a sweep with points xyz_sensor (N, 3) [m] of a turn that takes turn_s, stamped in its middle."""
    xyz_ego = geometry.apply(T_ego_sensor, xyz_sensor)
    xyz_map = geometry.apply(T_map_ego, xyz_ego)
    rows, height = clusters.heights(xyz_ego, T_ego_sensor[:2, 3], cfg)
    over = (height > cfg.low_m) & (height < COLUMN_M)
    after_s = turn_s * firing.turn_fraction(xyz_sensor[:, :2])[rows[over]]
    return Scan(stamp_us, xyz_map[rows[over]], height[over], after_s, xyz_map[rows[height < cfg.low_m / 2], :2],
                T_map_ego @ T_ego_sensor)


@dataclass(frozen=True)
class _Points:
    """The points over the ground of all scans: scan (N,) int, xyz (N, 3), height_m, after_s (N,)."""

    scans: Sequence[Scan]
    scan: np.ndarray
    xyz: np.ndarray
    height_m: np.ndarray
    after_s: np.ndarray

    def of(self, members: np.ndarray) -> Scan:
        """The scan that all of these rows are of."""
        return self.scans[self.scan[members[0]]]


def find(scans: Sequence[Scan], clustering: Clustering, knobs: Standing) -> pl.DataFrame:
    """The table RAW of scans in order of time.

    Standing points make things, but where the ground was seen when a thing was not, it only stopped for a while: its
    points are among the others then. Points inside a standing thing are its own, however seldom they are seen.
    """
    if not scans:
        return pl.DataFrame(schema=RAW)
    scans = _without_own(scans)
    scan = np.repeat(np.arange(len(scans)), [len(s.height_m) for s in scans])
    xyz, height_m, after_s = (np.concatenate([getattr(s, name) for s in scans])
                              for name in ("xyz_map", "height_m", "after_s"))
    times_s = (np.array([s.stamp_us for s in scans]) - scans[0].stamp_us) / 1e6
    share = standing.shares(times_s, scan, xyz[:, :2], knobs.window_s)
    stands = np.flatnonzero(share >= knobs.min_share)
    things = standing.things(xyz[stands, :2], height_m[stands], clustering.high_m, knobs.gap_m)
    free = standing.Free([s.ground_xy for s in scans])
    stood = share >= knobs.min_share
    own = np.zeros(len(share), bool)
    loose = np.flatnonzero(~stood)
    tree = cKDTree(xyz[loose, :2])
    points = _Points(scans, scan, xyz, height_m, after_s)
    rows = []
    for thing, members in _bodies(points, stands, things, clustering):
        angle = _along(xyz[members, :2])
        centre, size = clusters.rectangle(xyz[members, :2], angle)
        if free.share(centre, size, angle, scan[members]) > knobs.max_free_share:
            stood[members] = False
            continue
        if (size < HOLDS_M).all():
            near = loose[tree.query_ball_point(centre, np.hypot(*size) / 2)]
            own[near[(np.abs(rotate(xyz[near, :2] - centre, -angle)) < size / 2).all(1)]] = True
        rows += [_row(points, members[seen], thing, angle, top_m=things.top_m[thing], beside_share=1.0)
                 for seen in _runs(scan[members]) if seen.stop - seen.start >= clustering.min_points]
    moves = np.flatnonzero(~stood & ~own)
    beside = standing.beside(xyz[moves, :2], xyz[stood, :2], knobs.beside_m)
    rows += _others(points, moves, beside, clustering)
    return pl.DataFrame(rows, schema=RAW, orient="row").sort("stamp_us", "thing", "x_m", "y_m")


def _without_own(scans: Sequence[Scan]) -> list[Scan]:
    """The scans without what rides along: the ego vehicle's own roof, racks and mirrors."""
    way_m = np.hypot(*np.diff([scan.sensor_xy for scan in scans], axis=0).T).sum()
    if way_m < OWN_WAY_M:
        return list(scans)
    cells = []
    for scan in scans:
        xy = geometry.apply(geometry.invert(scan.T_map_sensor), scan.xyz_map)[:, :2]
        cells.append(np.where(np.hypot(*xy.T) < OWN_RANGE_M, np.floor(xy / OWN_CELL_M) @ (1, 1000), np.inf))
    places, count = np.unique(np.concatenate([np.unique(one) for one in cells]), return_counts=True)
    own = places[(count > OWN_SHARE * len(scans)) & np.isfinite(places)]
    keep = [~np.isin(one, own) for one in cells]
    return [replace(scan, **{name: getattr(scan, name)[mask] for name in ("xyz_map", "height_m", "after_s")})
            for scan, mask in zip(scans, keep)]


def _bodies(points: _Points, rows: np.ndarray, things: Things, cfg: Clustering) -> Iterator[tuple[int, np.ndarray]]:
    """(thing, its rows of points by scan) of the things, of_point of the points in rows (N,), that are not too big."""
    keep = (things.of_point >= 0) & (points.height_m[rows] < cfg.high_m)
    rows, thing = rows[keep], things.of_point[keep]
    order = np.lexsort((points.scan[rows], thing))
    rows, thing = rows[order], thing[order]
    for one in _runs(thing):
        if np.hypot(*np.ptp(points.xyz[rows[one], :2], axis=0)) <= BIG_M:
            yield int(thing[one.start]), rows[one]


def _along(xy: np.ndarray) -> float:
    """Direction of the longer sides of points (N, 2) [rad]."""
    angle = clusters.fit_angle(xy)
    _, size = clusters.rectangle(xy, angle)
    return angle if size[0] >= size[1] else angle + np.pi / 2


def _others(points: _Points, rows: np.ndarray, beside: np.ndarray, cfg: Clustering) -> Iterator[tuple]:
    """Rows of RAW of the clusters that points make in their scans: rows (N,) of them, and beside (N,) bool."""
    for one in _runs(points.scan[rows]):
        members, near = rows[one], beside[one]
        from_sensor, height = points.xyz[members, :2] - points.of(members).sensor_xy, points.height_m[members]
        for cluster in clusters.find(from_sensor, height, cfg):
            body = cluster[height[cluster] < cfg.high_m]
            xy = from_sensor[body]
            if len(body) >= cfg.min_points and np.hypot(*np.ptp(xy, axis=0)) <= BIG_M:
                yield _row(points, members[body], None, clusters.fit_angle(xy), beside_share=near[body].mean(),
                           top_m=clusters.top(height[cluster], np.hypot(*xy.mean(0))))


def _row(points: _Points, members: np.ndarray, thing: int | None, angle_rad: float, *, top_m: float,
         beside_share: float) -> tuple:
    """A row of RAW of points in the rows `members`, all of one scan."""
    xy, height, scan = points.xyz[members, :2], points.height_m[members], points.of(members)
    centre, size = clusters.rectangle(xy, angle_rad)
    after_s = points.after_s[members]
    if thing is None:
        corners = clusters.hull(xy)
        outline, outline_after_s = xy[corners] - centre, after_s[corners] - after_s.mean()
    else:
        outline, outline_after_s = clusters.corners(size, angle_rad), np.zeros(4)
    upper = xy[height > UPPER * top_m]
    lean_m = (upper.mean(0) - centre) @ (np.cos(angle_rad), np.sin(angle_rad)) if len(upper) else 0.0
    return (scan.stamp_us, thing, after_s.mean(), *centre, np.median(points.xyz[members, 2] - height), *size, top_m,
            float(geometry.wrap_rad(angle_rad)), lean_m, len(members), beside_share, *scan.sensor_xy,
            outline[:, 0], outline[:, 1], outline_after_s)


def _runs(values: np.ndarray) -> Iterator[slice]:
    """Slices of equal neighbours."""
    edges = np.flatnonzero(np.diff(values, prepend=values[:1] - 1, append=values[-1:] + 1))
    return (slice(start, stop) for start, stop in itertools.pairwise(edges.tolist()))
