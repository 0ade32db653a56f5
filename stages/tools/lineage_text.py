"""The text of `roadmill lineage`: short, indented, exact; what a person shows to another who was not there."""

from __future__ import annotations

import datetime
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from stages.lib.digests import canonical, digest_bytes
from stages.tools import history

WIDTH = 116
NUM_LISTED = 12  # of scenes, inputs, commits: the JSON document has all


def lines(document: Mapping[str, Any]) -> Iterator[str]:
    """The document of `lineage.lineage`, for people."""
    yield f"{document['asked']}: {document['kind']}"
    if document.get("revision", history.WORKING_TREE) != history.WORKING_TREE:
        yield f"  not in the working tree; of {document['revision']}"
    yield from _indented(_pairs(document.get("subject", {})))
    if document.get("scenes"):
        yield f"scenes: {len(document['scenes'])}"
        yield from _some(f"{one['name']}   {one['split']}   of {one['drive']}   pack {one['pack_digest']}"
                         for one in document["scenes"])
    for one in document.get("labels", ()):
        yield from _label(one)
    for one in document.get("recordings", ()):
        yield from _recording(one)
    if "looked_into" in document:
        yield "looked into: the working tree, {refs} refs, {commits} commits, {states} states of the data".format(
            **document["looked_into"])
        yield from (f"  not into {text}" for text in document["beyond"])
    if document.get("steps"):
        yield "made by, the last step first"
        for step in document["steps"]:
            yield from _indented(_step(step))
    if document.get("gaps"):
        yield "not known"
        for one in document["gaps"]:
            yield from (f"  {one['what']}", f"    {one['remedy']}")


def _label(one: Mapping[str, Any]) -> Iterator[str]:
    counts = [f"{one[name]} {words}" for name, words in (
        ("key_frames", "key frames"), ("boxes", "boxes"), ("boxes_ignored", "ignored"), ("scenes", "scenes"))
        if name in one]
    yield f"labels {one['source']}: {', '.join([*counts, *filter(None, [one.get('category')])]) or 'this box'}"
    yield from _some(f"{path}   sha256 {digest}" for path, digest in one["files"].items())


def _recording(one: Mapping[str, Any]) -> Iterator[str]:
    yield f"recording {one.get('name', 'of no list')}"
    yield from _indented(_pairs({"sha256": one["digest"], **{key: one[key] for key in ("bytes", "scan", "rig")
                                                             if key in one}}))
    yield from _wrapped("  listed by  ", _revs(one.get("listed_by", ())))
    if "datasets" not in one:
        return
    for kind in ("datasets", "models", "scores"):
        yield f"  {kind}: {len(one[kind])}"
        for made in one[kind]:
            yield f"    md5 {made['md5'] or '(on disk, in no dvc.lock)'}   scenes of it: {len(made['scenes'])}"
            yield from _wrapped("      of  ", _revs(made["revs"]))
            yield from ("    " + line for line in _some(
                f"{scene['name']}   {scene['split']}   pack {scene['pack_digest']}" for scene in made["scenes"]))
    if one["gaps"]:
        yield "  COULD NOT LOOK INTO"
        for gap in one["gaps"]:
            yield f"    {gap['path']} {gap['md5']}".rstrip()
            yield from _wrapped("      of  ", _revs(gap["revs"]))
            yield f"      {gap['remedy']}"


def _step(step: Mapping[str, Any]) -> Iterator[str]:
    code, evidence = step.get("code") or {}, step["evidence"]
    yield f"{step['stage']} {step.get('item', '')}".rstrip() + (
        f": {step['items']} items, alike in code and settings" if "items" in step else "")
    if step.get("action"):
        yield f"  action    {step['action']}   {evidence}"
    elif not evidence:
        yield "  nothing says how"
    if "digest" in code:
        yield f"  code      {code['digest']}"
        yield f"            {_whose(code)}"
        yield from _wrapped("  packages  ", [f"{name} {version}" for name, version in code["packages"].items()])
    elif code:
        yield f"  code      {len(code['files'])} files as in dvc.lock, " + (
            f"since changed: {', '.join(code['changed_since'])}" if code["changed_since"] else "as in this checkout")
        yield from _wrapped("  commits   ", [commit for commit in code["commits"]])
    if step.get("knobs"):
        yield from _wrapped("  settings  ", list(_leaves(step["knobs"])))
    if step.get("params"):
        yield from _wrapped("  item      ", [f"{name} {_short(value)}" for name, value in step["params"].items()])
    if step.get("salt"):
        yield f"  salt      {step['salt']}"
    yield from _some((f"input     {role}   {digest}" for role, digest in step.get("inputs", {}).items()), "  ")
    yield from _some((f"output    {file}   {digest}   {num_bytes} bytes"
                      for file, (digest, num_bytes) in step.get("outputs", {}).items()), "  ")
    if step.get("output_md5"):
        yield f"  output    md5 {step['output_md5']}"
    if step.get("run"):
        run = step["run"]
        at = datetime.datetime.fromtimestamp(run["started"], datetime.UTC).isoformat(" ", "seconds")
        yield f"  run       {at}, {run['host']}, {run['platform']}, python {run['python']}"
        yield from [f"            at commit {run['commit']}"] if run.get("commit") else []


def _leaves(values: Mapping[str, Any], where: str = "") -> Iterator[str]:
    for name, value in values.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{where}{name}.")
        else:
            yield f"{where}{name} {_plain(value)}"


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else canonical(value).decode()


def _short(value: Any) -> str:
    """The value, or the sha256 of one that is long: --json has it."""
    return f"(sha256 {digest_bytes(canonical(value))})" if isinstance(value, dict) else _plain(value)


def _whose(code: Mapping[str, Any]) -> str:
    if code["own"]:
        return "this checkout's" + (f", commit {code['commits'][0]}" if code["commits"] else ", not committed")
    if code["commits"]:
        return f"not this checkout's: that of commit {code['commits'][0]}"
    return "not this checkout's, and of no commit whose dvc.lock says what ran"


def _pairs(values: Mapping[str, Any]) -> Iterator[str]:
    width = max(map(len, values), default=0)
    for name, value in values.items():
        shown = ", ".join(_leaves(value)) if isinstance(value, dict) else _plain(value)
        yield f"{name:<{width}}  {shown}"


def _revs(revs: Iterable[str]) -> list[str]:
    return history.names(revs)


def _wrapped(label: str, words: list[str], separator: str = ", ") -> Iterator[str]:
    """The words behind the label, over as many lines as they need."""
    if not words:
        return
    text = separator.join(words)
    for number, line in enumerate(textwrap.wrap(text, WIDTH - len(label), break_on_hyphens=False)):
        yield (label if number == 0 else " " * len(label)) + line


def _some(texts: Iterable[str], indent: str = "  ") -> Iterator[str]:
    """The first of the texts, and how many more there are."""
    texts = list(texts)
    yield from (indent + text for text in texts[:NUM_LISTED])
    if len(texts) > NUM_LISTED:
        yield f"{indent}and {len(texts) - NUM_LISTED} more: --json"


def _indented(texts: Iterable[str]) -> Iterator[str]:
    return ("  " + text for text in texts)
