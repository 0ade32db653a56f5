"""What somebody made to do harm is refused in plain words: it writes nowhere else, takes no memory, runs nothing."""

import ast
import json
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest
import torch
from rosbags.rosbag1 import reader as rosbag1_reader

from stages import curate
from stages.lib import detector, inflate, names, nuscenes, tables
from stages.lib.errors import ConfigError, DataError
from stages.store.store import Store
from stages.tools import check, view
from tests import dataset_fixture, hostile

ROOT = Path(__file__).parents[1]
NOT_A_FILE = r"^DataError: file: member .* is not a plain file below the folder, as a pack's are\n  make the pack again"
TOO_MANY = r"^DataError: file: \d+ bytes that declare {} values are not a table of this program\n  .*`dvc repro -f ST"
NO_TABLE = r"^DataError: file: not a readable Parquet table: "
ENDS = {
    **dict.fromkeys([f"pack_{name}" for name in (*hostile.MEMBERS, "sparse", "member_past_the_end")], NOT_A_FILE),
    "pack_file_as_folder": r"^DataError: file: member 'samples/a' stands where another file is\n",
    "pack_header_past_the_end": r"^DataError: file: not a readable tar: ",
    "pack_read_of_any_length": r"^DataError: file: ends at byte 1024, a member needs bytes 0 to 1125899906842624\n",
    "pack_read_before_the_begin": r"^DataError: file: ends at byte 1024, a member needs bytes 512 to 511\n",
    "table_list_of_one_number": TOO_MANY.format(2**25),
    "table_of_one_row_again_and_again": TOO_MANY.format(2 * 10**7),
    "table_without_footer": f"{NO_TABLE}it does not end as Parquet does",
    "table_footer_of_lists_in_lists": f"{NO_TABLE}its footer is damaged",
    "json_deep": r"^DataError: file: is JSON nested too deep to be read\n  export it again, then `roadmill scan` ",
    "json_long": r"^DataError: file: is 268435457 bytes of JSON, at most 268435456 are read\n  `dvc repro -f ingest` ",
    "listing_leads_out": r"^ConfigError: file, line 1: not a recording: ",
    "listing_member_leads_out": r"^ConfigError: file, line 1: not a recording: ",
    "png_of_60000_squared": r"^DataError: an image that declares 60000x60000 pixels, at most 134217728 are read$",
    "jpeg_of_65535_squared": r"^DataError: an image that declares 65535x65535 pixels, at most 134217728 are read$",
    "jpeg_without_size": r"^DataError: a damaged or cut-off JPEG of 33 bytes$",
    "raw_image_without_width": r"^DataError: 0 bytes, but 0x4294967295 rgb8 with rows of 0 bytes was declared$",
    "raw_image_declared_large": r"^DataError: 8 bytes, but 65536x65536 rgb8 with rows of 196608 bytes was declared$",
    "cloud_declared_large": r"^DataError: the cloud has 0 bytes, but declares 2147483648 x 2147483648 points of 12 ",
    "cloud_of_points_without_bytes": r"^DataError: the cloud has no field x",
    "camera_of_60000_squared": r"^DataError: the camera's images are 60000x60000, expected 1 to 134217728 pixels$",
    "mcap_chunk_declares_a_terabyte": r"^DataError: .* a chunk declares 1099511627776 bytes, at most 536870912 are",
    "mcap_zstd_holds_more_than_declared": r"^DataError: .* a chunk of \d+ bytes holds more than 100, or its end is ",
    "mcap_lz4_holds_more_than_declared": r"^DataError: .* a chunk of \d+ bytes holds more than 100, or its end is ",
    "mcap_zstd_of_many_frames": r"^DataError: file\.mcap: damaged at its index: ",
    "mcap_record_declares_an_exabyte": r"^DataError: file\.mcap: damaged at its index: ",
    "ros1_list_of_messages_without_bytes": r"^DataError: .* a/msg/A\.xs is a list of a/msg/Empty, which holds noth",
    "ros1_list_of_nested_messages_without_bytes": r"^DataError: .* a/msg/A\.xs is a list of a/msg/B, which holds no",
    "ros1_fixed_array_of_many_texts": r"^DataError: .* a/msg/A\.xs has 1000000000 members, at most 1024 are read; ",
    "ros1_list_declared_long": r"^DataError: file\.bag: damaged at /x \(a/msg/A\), .*: Invalid sequence length 4294",
    "ros1_text_declared_long": r"^DataError: file\.bag: damaged at /x \(a/msg/A\), .*: Invalid string length 4294",
    "ros1_type_within_itself": r"^DataError: file\.bag: damaged at /x \(a/msg/A\), .*: RecursionError ",
    "ros1_constant_of_code": r"^read: \[a__msg__A\(x=7, X=\"x'\+__import__",
    "rosbag2_names_lead_out": r"^DataError: file: metadata\.yaml names '\.\.', which is no file; .*`ros2 bag reindex",
    "rosbag2_yaml_of_billion_laughs": r"^DataError: file/metadata\.yaml: can't be read: .* aliases, which recorders",
    "sqlite_view_without_end": r"^DataError: .*'message_definitions' in it is no plain table, and a recording has",
    "sqlite_name_that_opens_another_file": r"^DataError: .* path must be without \?, # and %; rename it and run ",
    "dataroot_file_outside": r"^read: None$",
    "dataroot_json_deep": r"^read: None$",
}


@pytest.fixture(scope="module")
def ends(tmp_path_factory) -> dict[str, str]:
    """Case -> what its reader ended with, in a process that gets 3 GiB."""
    folder = tmp_path_factory.mktemp("hostile")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "POLARS_MAX_THREADS": "1"}
    ran = subprocess.run([sys.executable, "-m", "tests.hostile", str(folder)], cwd=ROOT, env=environment, text=True,
                         capture_output=True)
    assert ran.returncode == 0, ran.stderr
    assert not list(folder.rglob("executed"))
    return json.loads(ran.stdout.splitlines()[-1])


def test_every_hostile_file_has_its_end_here():
    assert hostile.CASES.keys() == ENDS.keys()


@pytest.mark.parametrize("case", ENDS)
def test_a_hostile_file_is_refused_in_plain_words(ends, case):
    assert re.search(ENDS[case], ends[case]), ends[case]


def test_a_refused_pack_writes_nothing(tmp_path):
    path = hostile.tar_of(tmp_path / "pack.tar", "samples/a", "../b")
    with pytest.raises(DataError):
        hostile.pack.extract(path, tmp_path / "out")
    assert [one.name for one in tmp_path.iterdir()] == ["pack.tar"]


def test_a_pack_does_not_replace_what_another_one_wrote(tmp_path):
    path = hostile.tar_of(tmp_path / "pack.tar", "v1.0-roadmill/scene.json")
    (tmp_path / "v1.0-roadmill").mkdir()
    (tmp_path / "v1.0-roadmill/scene.json").write_text("[]")
    with pytest.raises(DataError, match=r"member 'v1\.0-roadmill/scene\.json' stands where another file is"):
        hostile.pack.extract(path, tmp_path)
    assert (tmp_path / "v1.0-roadmill/scene.json").read_text() == "[]"


@pytest.mark.parametrize("name", ["", ".", "..", "/", "/a", "a/..", "../a", "a//b", "a/", "./a", "a/./b", "a\0b",
                                  "a\nb", "a" * 1025, None, 7])
def test_a_name_that_is_no_plain_path_below_a_folder_is_none(name):
    assert not names.is_below(name)


@pytest.mark.parametrize("name", ["a", "samples/CAM_FRONT/x__CAM_FRONT__1.jpg", "Straße 1/drive", "..a", "a..b/c"])
def test_plain_names_are(name):
    assert names.is_below(name)


@pytest.mark.parametrize("unpack", [inflate.zstd, inflate.lz4, inflate.bz2])
def test_what_a_chunk_may_hold_is_bounded(unpack, monkeypatch):
    packed = {"zstd": hostile.zstd.compress, "lz4": hostile.lz4.frame.compress,
              "bz2": inflate.bzip2.compress}[unpack.__name__]
    assert unpack(packed(bytes(1000))) == bytes(1000)
    monkeypatch.setattr(inflate, "MAX_BYTES", 999)
    limits = () if unpack is inflate.bz2 else (999,)
    with pytest.raises(ValueError, match="holds more than 999, or its end is missing"):
        unpack(packed(bytes(1000)), *limits)
    with pytest.raises((ValueError, OSError, RuntimeError)):
        unpack(packed(os.urandom(900))[:-20], *limits)


def test_chunks_of_every_kind_of_recording_are_bounded():
    assert rosbag1_reader.decompressors["bz2"] is inflate.bz2
    assert rosbag1_reader.decompressors["lz4"] is inflate.lz4
    assert hostile.bag.storage_mcap.DECOMPRESSORS["zstd"] is inflate.zstd
    assert hostile.bag.storage_mcap.DECOMPRESSORS["lz4"] is inflate.lz4
    assert hostile.bag.rosbag2_reader.zstd is inflate


@pytest.mark.parametrize("name", ["../../outside.png", "/tmp/outside.png"])
def test_a_table_of_maps_leads_nowhere_else(tmp_path, name):
    world = dataset_fixture.build(tmp_path / "world")
    out, _ = dataset_fixture.run_merge(world, tmp_path / "merged")
    path = out.data / "tables/map.parquet"
    tables.write(tables.read(path).with_columns(filename=pl.lit(name)), path)
    with pytest.raises(DataError, match=r"map\.parquet: '.*outside\.png' is not a file's name below the dataroot\n"):
        nuscenes.write(out.data, tables.read(out.data / "tables/scene.parquet"), tmp_path / "a/b/root")
    assert not list(tmp_path.rglob("outside.png"))
    assert not Path("/tmp/outside.png").exists()


def test_a_manifest_that_names_a_path_for_a_digest_removes_nothing(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (tmp_path / "store/cas").mkdir(parents=True)
    store = Store.in_folder(tmp_path / "store")
    with pytest.raises(ConfigError, match=r"'\.\./victim' is not the sha256 of a blob: .*\n  `dvc checkout`"):
        store.need("../victim")
    assert victim.read_text() == "mine"


def test_check_says_what_is_wrong_with_a_hostile_dataroot(tmp_path):
    world = dataset_fixture.build(tmp_path / "world")
    out, _ = dataset_fixture.run_merge(world, tmp_path / "merged")
    root = tmp_path / "root"
    nuscenes.write(out.data, tables.read(out.data / "tables/scene.parquet"), root)
    for path in world.packs.values():
        hostile.pack.extract(path, root)
    table = root / nuscenes.VERSION / "sample_data.json"
    rows = json.loads(table.read_text())
    cameras = [row for row in rows if row["filename"].startswith("samples/CAM_FRONT")]
    (root / cameras[0]["filename"]).write_bytes(hostile.png(60_000, 60_000))
    cameras[1]["filename"] = "samples/../../merged/data/README.md"
    table.write_text(json.dumps(rows))
    pose = next((root / "can_bus").glob("*_pose.json"))
    pose.write_bytes(b"[" * 10**6)
    found = {one.rule: one for one in check.check(root)}
    assert found["T9"].count == 2
    assert "it is no JSON array of objects" in found["M1"].sentence
    (root / nuscenes.VERSION / "scene.json").write_bytes(b"[" * 10**6)
    assert check.check(root)[0].sentence == "scene.json is missing or no JSON array of objects"
    assert view.Disk(root).size("../merged/data/README.md") is None


# models ---------------------------------------------------------------------------------------------------------------
class Code:
    """What a pickle would execute."""

    def __init__(self, victim: Path) -> None:
        self._victim = victim

    def __reduce__(self):
        return os.mkdir, (str(self._victim),)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("save", [torch.save, lambda what, path: path.write_bytes(pickle.dumps(what))],
                         ids=["torch", "pickle"])
def test_a_model_that_is_code_is_not_executed(tmp_path, save):
    save({"format": 1, "architecture": {}, "state": Code(tmp_path / "executed")}, tmp_path / "model.pt")
    with pytest.raises(DataError, match=r"model\.pt: not a model of this program .*\n  make it again: `dvc repro"):
        detector.load(tmp_path / "model.pt")
    assert not (tmp_path / "executed").exists()


ARCHITECTURE = {"classes": ("a",), "range_m": (0.0, 0.0, 0.0, 16.0, 16.0, 1.0), "pillar_m": 1.0, "num_sweeps": 1,
                "ego_box_m": (0.0, 0.0, 1.0, 1.0), "intensity": False, "pillar_channels": 4, "stages": (4, 4),
                "convs_per_stage": 1, "neck_channels": 4, "bn_momentum": 0.1, "nms_radius_m": (1.0,),
                "min_score": 0.1, "max_boxes": 5}


@pytest.mark.parametrize(("change", "words"), [
    ({"pillar_channels": 10**6}, r"\d+ parameters in \d+ bytes"), ({"pillar_m": 1e-3}, "layers or 16777216 pillars"),
    ({"convs_per_stage": 10**9}, "more than 1024 layers"), ({"stages": "os.system"}, "expected list")])
def test_a_model_is_no_larger_than_its_file(tmp_path, change, words):
    net = detector.Net(detector.Architecture(**ARCHITECTURE))
    state = {"format": 1, "provenance": {}, "state": net.state_dict()}
    torch.save({**state, "architecture": ARCHITECTURE}, tmp_path / "good.pt")
    assert detector.load(tmp_path / "good.pt").arch.pillar_channels == 4
    torch.save({**state, "architecture": ARCHITECTURE | change}, tmp_path / "model.pt")
    with pytest.raises(DataError, match=rf"model\.pt: not a model of this program \(.*{words}"):
        detector.load(tmp_path / "model.pt")


# SQL that people write ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("condition", [
    "(SELECT count(*) FROM read_csv('FILE')) >= 0", "(SELECT count(*) FROM 'FILE') >= 0",
    "(SELECT count(*) FROM read_text('FILE')) >= 0", "(SELECT count(*) FROM glob('/*')) >= 0",
    "(SELECT count(*) FROM read_parquet('https://127.0.0.1:9/x.parquet')) >= 0",
    "(SELECT count(*) FROM read_parquet('s3://bucket/x.parquet')) >= 0",
    "true); COPY (SELECT 1) TO 'OUT'; SELECT (true", "true) FROM scene; ATTACH 'OUT' AS a; SELECT (true",
    "getenv('HOME') <> ''", "(SELECT count(*) FROM judged) >= 0", "(SELECT count(*) FROM duckdb_secrets()) >= 0"])
def test_a_rule_reaches_neither_files_nor_network_nor_this_program(tmp_path, condition):
    file, out = tmp_path / "file.csv", tmp_path / "out.csv"
    file.write_text("a\n1\n")
    condition = condition.replace("FILE", str(file)).replace("OUT", str(out))
    candidates = pl.DataFrame({"scene_token": ["a"], "duration_s": [20.0], "max_speed_mps": [5.0]})
    with pytest.raises(ConfigError, match=r"curate\.rules\.x is "):
        curate.judge(candidates, {"x": condition}, 5.0, tmp_path / "scratch.parquet")
    assert [one.name for one in tmp_path.iterdir()] == ["file.csv"]


# laws -----------------------------------------------------------------------------------------------------------------
# module or call that can execute, or open, what data says -> the files that may use it, and why
ONLY = {
    # exceptions between a worker and its own parent; a task on its way to a process that the sender started
    "pickle": {"stages/runners/local.py", "stages/lib/ranks.py"},
    "joblib": set(), "dill": set(), "cloudpickle": set(), "marshal": set(), "shelve": set(), "runpy": set(),
    "tarfile": {"stages/lib/pack.py", "stages/tools/origin.py"},  # there: what git archives, with the filter "data"
    "zipfile": set(), "xml": set(), "onnxruntime": set(), "sqlite3": {"stages/lib/bagfiles.py"},
    "backports": {"stages/lib/inflate.py"}, "lz4": {"stages/lib/inflate.py"}, "bz2": {"stages/lib/inflate.py"},
    "zlib": set(), "gzip": set(), "lzma": set(),
}
CALLS = re.compile(
    r"^(eval|exec|compile|__import__|os\.(system|popen|exec\w+|spawn\w+)|importlib\.reload|.*\.extractall|.*\.extract|"
    r"(pl|polars)\.read_(parquet|ipc)|(pl|polars)\.(scan_parquet|deserialize)|.*\.read_pickle|onnx\.load|"
    r"yaml\.(unsafe_load|full_load|load_all)|torch\.(jit|hub|package)\..*|np\.lib\..*)$")
MAY_CALL = {("stages/tools/export.py", "pack.extract"), ("stages/lib/tables.py", "pl.read_parquet"),
            ("stages/lib/tables.py", "pl.scan_parquet"),
            # fragments that this checkout's own actions made, by digest: a hundred thousand, streamed
            ("stages/merge.py", "pl.scan_parquet")}
SOURCES = sorted((ROOT / "stages").rglob("*.py"))


def offences(path: Path, name: str) -> list[str]:
    """What a module uses that could execute what it reads."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if name not in ONLY.get(alias.name.split(".")[0], {name})]
        elif isinstance(node, ast.ImportFrom) and name not in ONLY.get((node.module or "").split(".")[0], {name}):
            found.append(node.module)
        elif isinstance(node, ast.Call):
            called, options = ast.unparse(node.func), {one.arg: ast.unparse(one.value) for one in node.keywords}
            called += " with the filter data" if options.get("filter") == "'data'" else ""
            if CALLS.match(called) and (name, called) not in MAY_CALL:
                found.append(called)
            if called == "torch.load" and options.get("weights_only") != "True":
                found.append("torch.load without weights_only=True")
            if called == "yaml.load" and [ast.unparse(one) for one in node.args[1:]] != ["yaml.CSafeLoader"]:
                found.append("yaml.load without yaml.CSafeLoader")
            found += [option for option in ("allow_pickle", "shell") if options.get(option, "False") != "False"]
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_module_can_execute_what_it_reads(path):
    assert not offences(path, str(path.relative_to(ROOT)))


@pytest.mark.parametrize("line", [
    "import pickle", "from pickle import loads", "import joblib", "eval(x)", "exec(x)", "torch.load(x)",
    "torch.load(x, weights_only=False)", "np.load(x, allow_pickle=True)", "yaml.load(x)", "yaml.load(x, yaml.Loader)",
    "subprocess.run(x, shell=True)", "import tarfile", "tar.extractall(x)", "os.system(x)", "pl.read_parquet(x)",
    "onnx.load(x)", "import onnxruntime"])
def test_each_of_these_would_be_found(tmp_path, line):
    (tmp_path / "module.py").write_text(line)
    assert offences(tmp_path / "module.py", "stages/lib/module.py")


