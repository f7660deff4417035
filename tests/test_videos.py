import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from s3 import Bucket, proxy

from raypipe import storage
from raypipe.errors import UserError
from raypipe.plan import plan_run
from raypipe.videos import Listing, Video, list_videos, local_path


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test stands in an empty folder."""
    monkeypatch.chdir(tmp_path)


def touch(*names: str, content: bytes = b"12345") -> None:
    for name in names:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(content)


def short(listing: Listing) -> list[tuple[str, str | None]]:
    return [(video.video_id, video.label) for video in listing.videos]


# --- folders, globs, URIs ---------------------------------------------------------------------------


def test_a_folder_gives_ids_labels_sizes_and_times() -> None:
    touch("clips/b/2.MP4", "clips/a/deep/1.avi", "clips/0.webm")
    os.utime("clips/b/2.MP4", (7, 7.25))
    listing = list_videos("clips")
    assert short(listing) == [("0.webm", None), ("a/deep/1.avi", "a"), ("b/2.MP4", "b")]
    assert listing.videos[2] == Video(
        "b/2.MP4", os.path.abspath("clips/b/2.MP4"), label="b", size_bytes=5, modified_s=7.25
    )


def test_other_and_hidden_files_are_counted_not_listed() -> None:
    touch("clips/a/1.mp4", "clips/a/notes.txt", "clips/a/._1.mp4", "clips/.cache/2.mp4")
    assert (short(list_videos("clips")), list_videos("clips").ignored) == ([("a/1.mp4", "a")], 2)


def test_ids_stay_when_the_folder_moves() -> None:
    touch("here/a/1.mp4")
    before = list_videos("here").videos
    Path("here").rename("there")
    after = list_videos(os.path.abspath("there") + "/").videos
    assert [v.video_id for v in before] == [v.video_id for v in after]


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("clips/*.mp4", [("0.mp4", None)]),
        ("clips/a/*", [("1.mp4", None), ("2.mkv", None)]),
        ("clips/*/*.mp4", [("a/1.mp4", "a"), ("b/3.mp4", "b")]),
        ("clips/[ab]/?.m*", [("a/1.mp4", "a"), ("a/2.mkv", "a"), ("b/3.mp4", "b")]),
        ("clips/**/3.mp4", [("b/3.mp4", "b")]),
    ],
)
def test_a_glob(pattern: str, found: list[tuple[str, str | None]]) -> None:
    touch("clips/0.mp4", "clips/a/1.mp4", "clips/a/2.mkv", "clips/b/3.mp4", "clips/b/notes.txt")
    assert short(list_videos(pattern)) == found
    assert short(list_videos(os.path.abspath(pattern))) == found


def test_folders_that_are_links_are_walked_and_none_twice() -> None:
    touch("clips/calm/1.mp4", "elsewhere/fight/2.mp4", "elsewhere/fight/deep/3.mp4")
    os.symlink(os.path.abspath("elsewhere/fight"), "clips/fight")
    os.symlink("../calm", "clips/calm/again")  # within
    os.symlink(os.path.abspath("."), "clips/around")
    os.symlink(os.path.abspath("elsewhere/fight"), "elsewhere/fight/deep/back")
    os.symlink(os.path.abspath("elsewhere/fight"), "clips/zweitens")  # the same once more
    os.symlink("nowhere", "clips/broken")
    assert short(list_videos("clips")) == [
        ("calm/1.mp4", "calm"), ("fight/2.mp4", "fight"), ("fight/deep/3.mp4", "fight"),
    ]  # fmt: skip


def test_a_file_uri_is_the_folder_it_names() -> None:
    touch("my clips/a/1 %41#?.mp4", "my clips/b/ü.mp4")
    listing = list_videos("my clips")
    assert list_videos(Path("my clips").absolute().as_uri()) == listing
    assert [v.label for v in listing.videos] == ["a", "b"]


def test_a_name_that_is_not_text_is_listed_under_one_that_is() -> None:
    """Rows are UTF-8; the file is still found by its true name."""
    touch(os.fsdecode(b"clips/k\xff/a\xfe.mp4"))
    (video,) = list_videos("clips").videos
    assert (video.video_id, video.label, video.size_bytes) == ("k\\xff/a\\xfe.mp4", "k\\xff", 5)
    assert video.path == Path("clips").absolute().as_uri() + "/k%FF/a%FE.mp4"
    assert os.path.getsize(local_path(video.path) or "") == 5
    pa.array([video.video_id, video.path, video.label]).validate(full=True)


def test_a_bucket() -> None:
    bucket = Bucket().put({"clips/a/1 x.mp4": b"12345", "clips/b/2%41.mp4": b"123", "clips/notes.txt": b"1"})
    listing = list_videos(bucket.uri("clips"))
    assert listing.ignored == 1
    assert [(v.video_id, v.path, v.label, v.size_bytes) for v in listing.videos] == [
        ("a/1 x.mp4", bucket.uri("clips/a/1%20x.mp4"), "a", 5),
        ("b/2%41.mp4", bucket.uri("clips/b/2%2541.mp4"), "b", 3),
    ]
    assert all(video.modified_s for video in listing.videos)


def test_a_manifest_in_a_bucket() -> None:
    bucket = Bucket()
    manifest = f"path,label\na/1 x.mp4,a\n/local.mp4,b\ns3://other/y.mp4{bucket.options},c\n"
    bucket.put({"clips/labels.csv": manifest.encode()})
    videos = list_videos(bucket.uri("clips/labels.csv")).videos
    assert {v.label: v.path for v in videos} == {
        "a": bucket.uri("clips/a/1%20x.mp4"),
        "b": "/local.mp4",
        "c": f"s3://other/y.mp4{bucket.options}",
    }


def test_a_changed_object_is_noticed_and_many_are_looked_up_in_few_requests() -> None:
    """120 of one folder, where 30 more lie, 3 of others, and 2 that are not there."""
    many = [f"clips/many/{number:03} x.mp4" for number in range(120)]
    few = ["clips/a/1.mp4", "clips/b/1.mp4", "clips/2.mp4"]
    rows = "\n".join(["path", *many, *few, "clips/gone.mp4", "clips/many/gone.mp4", "https://127.0.0.1:9/x"])
    others = [f"clips/many/{number}" for number in range(30)]
    bucket = Bucket().put({key: b"video" for key in (*many, *few, *others)} | {"l.csv": rows.encode()})
    with proxy() as traffic:
        source = traffic.bucket(bucket).uri("l.csv")
        before = list_videos(source).videos
        print(len(traffic.requests), "requests")
        assert len(traffic.requests) < 20
        sizes = {video.video_id: video.size_bytes for video in before}
        assert sizes == dict.fromkeys([*many, *few], 5) | {
            "clips/gone.mp4": None, "clips/many/gone.mp4": None, "https://127.0.0.1:9/x": None,
        }  # fmt: skip
        assert all(video.modified_s for video in before if video.size_bytes)
        bucket.put({many[7]: b"another", few[1]: b"another"})
        index = pa.Table.from_pylist([asdict(video) | {"outcome": "ok"} for video in before])
        plan = plan_run(list_videos(source).videos, [index], retry_failed=False)
        assert [video.video_id for video in plan.todo] == [few[1], many[7]] and plan.done == 124


def test_a_bucket_that_does_not_answer_ends_the_listing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its rows would else be taken for changed, and be replaced by failures."""
    monkeypatch.setattr(storage, "S3_ATTEMPTS", 1)
    bucket = Bucket()
    with proxy() as traffic:
        away = traffic.bucket(bucket)
        traffic.fault = lambda method, path: "500"
        Path("labels.csv").write_text("\n".join(["path", *(away.uri(f"{n}.mp4") for n in range(3))]))
        assert "what it lists cannot be looked up: When getting information for key " in error_of(
            "labels.csv"
        )


# --- manifests --------------------------------------------------------------------------------------

CSV = """\
path,label,note,group,split,video_id
a/1.mp4,01,x,7.50,train,one
a/2.mp4,null,x,,,
gone.mp4,2024-01-01,x,NA,test,1e3
"""
JSONL = """\
{"path": "a/1.mp4", "label": "01", "note": {"x": 1}, "group": "7.50", "split": "train", "video_id": "one"}

{"path": "a/2.mp4", "label": "null", "group": null}
{"path": "gone.mp4", "label": "2024-01-01", "group": "NA", "split": "test", "video_id": "1e3"}
"""
COLUMNS = {
    "path": ["a/1.mp4", "a/2.mp4", "gone.mp4"],
    "label": ["01", "null", "2024-01-01"],
    "group": ["7.50", None, "NA"],
    "split": ["train", None, "test"],
    "video_id": ["one", None, "1e3"],
}


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_a_manifest_keeps_its_words_as_they_are(kind: str) -> None:
    touch("data/a/1.mp4", "data/a/2.mp4")
    file = f"data/labels.{kind}"
    if kind == "parquet":
        pq.write_table(pa.table(COLUMNS), file)
    else:
        Path(file).write_text({"csv": CSV, "jsonl": JSONL}[kind])
    found = list_videos(file).videos
    assert [(v.video_id, v.label, v.group, v.split, v.size_bytes) for v in found] == [
        ("1e3", "2024-01-01", "NA", "test", None),
        ("a/2.mp4", "null", None, None, 5),
        ("one", "01", "7.50", "train", 5),
    ]
    assert found[2].path == os.path.abspath("data/a/1.mp4")
    assert list_videos(Path(file).absolute().as_uri()).videos == found


def test_typed_columns_become_text() -> None:
    touch("1.mp4", "2.mp4", "3.mp4")
    columns = {
        "path": ["1.mp4", "2.mp4"],
        "label": [1, 2],
        "group": pa.array(["x", None]).dictionary_encode(),
    }
    pq.write_table(pa.table(columns), "labels.parquet")
    Path("labels.jsonl").write_text('{"path": "1.mp4", "label": 1}\n{"path": "2.mp4", "label": "b"}')
    assert [(v.label, v.group) for v in list_videos("labels.parquet").videos] == [("1", "x"), ("2", None)]
    assert [v.label for v in list_videos("labels.jsonl").videos] == ["1", "b"]


def test_a_manifest_may_name_any_file_anywhere() -> None:
    touch("here/x.bin", "else where/y.mp4")
    uri = Path("else where/y.mp4").absolute().as_uri()
    far = Bucket().uri("z.mp4")
    Path("here/labels.csv").write_text(f"\ufeffpath\nx.bin\n{uri}\n{far}\n{os.path.abspath('q')}\n")
    assert {v.path: v.size_bytes for v in list_videos("here/labels.csv").videos} == {
        os.path.abspath("here/x.bin"): 5,
        os.path.abspath("else where/y.mp4"): 5,
        far: None,
        os.path.abspath("q"): None,
    }


# --- mistakes ---------------------------------------------------------------------------------------


def error_of(source: str) -> str:
    with pytest.raises(UserError) as caught:
        list_videos(source)
    error = str(caught.value)
    assert error.startswith(f"--input {source}: ") and "\n" not in error
    return error.removeprefix(f"--input {source}: ")


HINT = "; give a folder, a .csv/.parquet/.jsonl, a glob or a URI"


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("nowhere", f"does not exist{HINT}"),
        ("file.mp4", f"is a file, not a folder or manifest{HINT}"),
        ("empty", "no videos found; name a folder, manifest, glob or URI that has some"),
        ("texts", "no videos found; the 2 files there have no video's suffix, name them in a manifest"),
        ("texts/*", "no videos found; the 2 files there have no video's suffix, name them in a manifest"),
        ("*.mkv", "no videos found; name a folder, manifest, glob or URI that has some"),
        ("none.csv", "no such file"),
        ("nope://host/clips", "cannot be listed: Unrecognized filesystem type in URI: nope://host/clips"),
    ],
)
def test_a_source_without_videos(source: str, said: str) -> None:
    touch("file.mp4", "texts/a.txt", "texts/b.txt")
    Path("empty").mkdir()
    assert error_of(source) == said


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("m.csv", "file,label\nv.mp4,a\n", "has no column path; its columns are: file, label"),
        ("m.csv", "path;label\nv.mp4;a\n", "has no column path; its columns are: path;label"),
        ("m.csv", "path,path\nv.mp4,w.mp4\n", "has more than one column path"),
        ("m.csv", "path,label\n", "no videos found; name a folder, manifest, glob or URI that has some"),
        ("m.csv", "", "cannot be read: Empty CSV file"),
        ("m.csv", "path,label\nv.mp4\n", "cannot be read: CSV parse error: Expected 2 columns, got 1: v.mp4"),
        ("m.csv", "path,label\nv.mp4,a\n,b\n", "row 2 has no path"),
        ("m.csv", "path,label\nv.mp4,a\n./v.mp4,b\n", "the video {v} is listed 2 times; list it once"),
        ("m.csv", "path,video_id\nv.mp4,x\nw.mp4,x\n", "the video_id x is listed 2 times; list it once"),
        ("m.csv", "path\ngone.mp4\ngone2.mp4\n", "none of its 2 videos exists, for example {gone}; "
         "paths are relative to the manifest's folder"),
        ("m.jsonl", '{"path": "v.mp4"}\n["v.mp4"]\n', "cannot be read: line 2 is not a JSON object"),
        ("m.jsonl", '{"path": "v.mp4"\n', "cannot be read: line 1 is not a JSON object"),
        ("m.jsonl", '{"label": "v.mp4"}\n', "has no column path; its columns are: label"),
        ("m.parquet", "PAR1", "cannot be read: Could not open Parquet input source '<Buffer>': "
         "Parquet file size is 4 bytes, smaller than the minimum file footer (8 bytes)"),
    ],
)  # fmt: skip
def test_a_mistake_in_a_manifest(name: str, content: str, said: str) -> None:
    touch("v.mp4", "w.mp4")
    Path(name).write_text(content)
    assert error_of(name) == said.format(v=os.path.abspath("v.mp4"), gone=os.path.abspath("gone.mp4"))


def test_a_manifest_that_is_not_utf8() -> None:
    touch("v.mp4")
    Path("m.csv").write_bytes(b"path,label\nv.mp4,\xff\n")
    assert error_of("m.csv").endswith("invalid UTF8 data")


@pytest.mark.parametrize("name", ["a\0b.mp4", "x" * 300 + ".mp4"])
def test_an_impossible_name_is_a_video_that_is_not_there(name: str) -> None:
    touch("v.mp4")
    pq.write_table(pa.table({"path": ["v.mp4", name]}), "m.parquet")
    assert {v.video_id: v.size_bytes for v in list_videos("m.parquet").videos} == {"v.mp4": 5, name: None}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may list every folder")
def test_a_folder_that_may_not_be_listed_is_not_passed_over() -> None:
    touch("clips/a/1.mp4", "clips/b/2.mp4")
    os.chmod("clips/b", 0)
    assert error_of("clips") == "clips/b cannot be listed: Permission denied"


def test_listing_imports_no_arrow() -> None:
    """The decoder's child imports this module; pyarrow would cost it 0.2 s and 60 MB."""
    code = "import sys, raypipe.videos; print('pyarrow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).stdout == b"False\n"
