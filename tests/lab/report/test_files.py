"""Files that survive a kill."""

import json
import os

import pytest

from bn_jax.lab.report import append_record, open_records, read_records, write_atomically


def test_write_replaces_the_whole_file(tmp_path):
    path = tmp_path / "summary.json"
    path.write_text("an older and longer text")
    (tmp_path / "other").touch()
    write_atomically(path, "é\n")
    assert path.stat().st_mode == (tmp_path / "other").stat().st_mode
    (tmp_path / "other").unlink()
    assert path.read_bytes() == "é\n".encode()
    assert os.listdir(tmp_path) == ["summary.json"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failed_write_leaves_what_was_there(tmp_path, monkeypatch, call):
    path = tmp_path / "summary.json"
    path.write_text("old")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["summary.json"]


def test_records_come_back(tmp_path):
    path = tmp_path / "records.jsonl"
    records = [{"arm": "bn", "steps": [0, 20], "loss": [None, 0.1]}, {"arm": "é\n"}]
    append_record(path, records[0])
    with open_records(path) as file:
        append_record(file, records[1])
        # Flushed: another process sees it while the file is open.
        assert read_records(path) == records


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_numbers_that_json_lacks_are_refused_before_anything_is_written(tmp_path, number):
    path = tmp_path / "records.jsonl"
    append_record(path, {"loss": 1.0})
    with pytest.raises(ValueError, match="not JSON compliant"):
        append_record(path, {"loss": [1.0, number]})
    assert read_records(path) == [{"loss": 1.0}]


@pytest.mark.parametrize("cut", range(1, len('{"seed": "é"}')))
def test_a_line_cut_off_anywhere_is_left_out_and_written_over(tmp_path, cut):
    path = tmp_path / "records.jsonl"
    line = '{"seed": "é"}'.encode()  # a cut may fall within a character
    path.write_bytes(b'{"seed": 0}\n' + line[:cut])
    assert read_records(path) == [{"seed": 0}]
    append_record(path, {"seed": 2})
    assert read_records(path) == [{"seed": 0}, {"seed": 2}]


def test_a_line_that_lacks_only_its_end_is_kept(tmp_path):
    path = tmp_path / "records.jsonl"
    path.write_text('{"seed": 0}\n{"seed": 1}')
    assert read_records(path) == [{"seed": 0}, {"seed": 1}]
    append_record(path, {"seed": 2})
    assert [r["seed"] for r in read_records(path)] == [0, 1, 2]


@pytest.mark.parametrize("damaged", ["{", "3", "", '{"seed": 1} {"seed": 2}'])
def test_any_other_damage_names_file_and_line(tmp_path, damaged):
    path = tmp_path / "records.jsonl"
    path.write_text(f'{{"seed": 0}}\n{damaged}\n{{"seed": 2}}\n')
    with pytest.raises(ValueError, match=r"records\.jsonl, line 2"):
        read_records(path)


def test_an_empty_file_has_no_records(tmp_path):
    path = tmp_path / "records.jsonl"
    path.touch()
    assert read_records(path) == []
    append_record(path, {"seed": 0})
    assert json.loads(path.read_text()) == {"seed": 0}
