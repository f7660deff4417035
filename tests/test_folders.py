"""The folder of a run: its name, and who makes it."""

import pytest
from s3 import Bucket
from torn import killed_while_writing

from raypipe.config import TuneConfig
from raypipe.errors import UserError
from raypipe.folders import alone_in, begin, new_run_folder, none_left_blank
from raypipe.storage import RemotePath


def test_a_run_never_overwrites_another(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert [new_run_folder(tmp_path, None).name for _ in range(3)] == ["tune", "tune-2", "tune-3"]
    mine = new_run_folder(tmp_path, "mine")
    begin(TuneConfig(), mine)
    assert mine.name == "mine"
    with pytest.raises(UserError, match=r"--name mine: .* exists; choose another name, or go on with it"):
        new_run_folder(tmp_path, "mine")


@pytest.mark.parametrize("name", ["../x/y", "x/y", "/x", "..", ".", ""])
def test_a_name_stays_in_the_folder_of_results(tmp_path, name):
    with pytest.raises(UserError, match=r"^--name .*: is the name of one folder in --results "):
        new_run_folder(tmp_path / "results", name)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("name", "folder"), [(None, "tune"), ("mine", "mine")])
def test_results_where_nothing_can_be_made_are_blamed_on_their_own_flag(tmp_path, name, folder):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=rf"^--results .*: .*/{folder} cannot be made: Not a directory"):
        new_run_folder(tmp_path / "file" / "results", name)


def test_in_a_bucket_a_run_is_there_once_something_is_in_it():
    results = RemotePath(Bucket().uri("results"))
    first, second = new_run_folder(results, None), new_run_folder(results, None)
    assert first == second == results / "tune"
    begin(TuneConfig(), first)
    with pytest.raises(UserError, match="another run began there at the same time; run the command again"):
        begin(TuneConfig(), second)
    assert new_run_folder(results, None).name == "tune-2"
    with pytest.raises(UserError, match=r"--name tune: s3://.* exists; .*--resume 's3://"):
        new_run_folder(results, "tune")


def test_a_name_is_free_again_where_no_run_could_begin(tmp_path):
    folder = new_run_folder(tmp_path, "mine")
    with pytest.raises(ConnectionError), alone_in(folder), none_left_blank(folder):
        raise ConnectionError("no cluster answers")
    assert not folder.exists()
    with alone_in(new_run_folder(tmp_path, "mine")):
        pass  # killed before it had begun
    assert [file.name for file in folder.iterdir()] == [".lock"]
    assert new_run_folder(tmp_path, "mine") == folder


def test_a_name_is_free_again_where_the_first_file_was_written_in_part(tmp_path):
    folder = new_run_folder(tmp_path, "mine")
    killed_while_writing(folder / "config.yaml")
    assert list(folder.iterdir())
    assert new_run_folder(tmp_path, "mine") == folder
    with pytest.raises(ConnectionError), alone_in(folder), none_left_blank(folder):
        raise ConnectionError("no cluster answers")
    assert not folder.exists()


def test_a_run_that_began_is_kept_whatever_ends_it(tmp_path):
    folder = new_run_folder(tmp_path, None)
    with pytest.raises(ConnectionError), alone_in(folder), none_left_blank(folder):
        begin(TuneConfig(), folder)
        raise ConnectionError("the cluster ended")
    assert (folder / "config.yaml").is_file()
