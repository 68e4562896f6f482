"""Streamed .npz files against numpy's own reading and writing; damaged and hostile ones."""

from __future__ import annotations

import zipfile

import numpy as np
import pytest

from var_fast.errors import UserError
from var_fast.evaluation.npz import members, open_pictures, read_comment, read_part, write_npz

PICTURES = np.random.default_rng(0).integers(0, 256, (7, 4, 5, 3), dtype=np.uint8)


def read(path, batch=3, between=None):
    with open_pictures(path, batch) as pictures:
        return list(pictures.between(*between) if between else pictures)


def test_numpy_reads_what_is_written(tmp_path):
    file = tmp_path / "a.npz"
    write_npz(file, PICTURES.shape, [PICTURES[:2], PICTURES[2:]], b"a remark")
    with np.load(file, allow_pickle=False) as arrays:
        assert arrays.files == ["arr_0"]
        assert arrays["arr_0"].dtype == np.uint8 and arrays["arr_0"].flags.c_contiguous
        np.testing.assert_array_equal(arrays["arr_0"], PICTURES)
    assert read_comment(file) == b"a remark" and members(file) == {"arr_0"}
    with zipfile.ZipFile(file) as archive:
        assert archive.getinfo("arr_0.npy").compress_type == zipfile.ZIP_STORED
    again = tmp_path / "b.npz"
    write_npz(again, PICTURES.shape, [PICTURES], b"a remark")
    assert again.read_bytes() == file.read_bytes()


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_reads_what_numpy_writes(tmp_path, save):
    save(tmp_path / "a.npz", PICTURES)
    parts = read(tmp_path / "a.npz")
    assert [len(p) for p in parts] == [3, 3, 1]
    np.testing.assert_array_equal(np.concatenate(parts), PICTURES)
    np.testing.assert_array_equal(np.concatenate(read(tmp_path / "a.npz", 2, (3, 6))), PICTURES[3:6])
    assert read(tmp_path / "a.npz", 2, (7, 7)) == []


def test_writing_refuses_what_does_not_fit(tmp_path):
    for arrays in ([PICTURES[:3]], [PICTURES.astype(np.int16)], [PICTURES[:, :2]]):
        with pytest.raises(ValueError, match="write_npz"):
            write_npz(tmp_path / "a.npz", PICTURES.shape, arrays)


def test_parts_are_whole_or_none(tmp_path):
    file = tmp_path / "a.npz"
    assert read_part(file, PICTURES.shape) is None
    write_npz(file, PICTURES.shape, [PICTURES])
    np.testing.assert_array_equal(read_part(file, PICTURES.shape), PICTURES)
    assert read_part(file, (6, 4, 5, 3)) is None
    data = bytearray(file.read_bytes())
    at = data.index(PICTURES[3].tobytes())
    for change in (at, at + 17, data.index(PICTURES[6].tobytes()) + PICTURES[6].size - 1):
        damaged = bytearray(data)
        damaged[change] ^= 1
        file.write_bytes(damaged)
        assert read_part(file, PICTURES.shape) is None, "one flipped bit is found"
    for length in (0, 10, len(data) // 2, len(data) - 1):
        file.write_bytes(data[:length])
        assert read_part(file, PICTURES.shape) is None


def member(path, contents: bytes, name="arr_0.npy"):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(name, contents)


def npy(shape, descr="'|u1'", data=b"", order=False) -> bytes:
    text = f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}}}"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode() + data


@pytest.mark.parametrize(
    "contents, words",
    [
        (npy((2, 2, 2, 3), data=bytes(23)), "cut short"),
        (npy((10**9, 10**6, 10**6, 3)), "cut short"),
        (npy((2, 2, 2, 3), "'|O'", bytes(99)), "expected uint8"),
        (npy((2, 2, 2, 3), "'<f4'", bytes(99)), "float32.*expected uint8"),
        (npy((2, 2, 3), data=bytes(12)), "expected uint8 \\(N, H, W, 3\\)"),
        (npy((2, 2, 2, 4), data=bytes(32)), "expected uint8 \\(N, H, W, 3\\)"),
        (npy((0, 2, 2, 3)), "expected uint8 \\(N, H, W, 3\\)"),
        (npy((2, 2, 2, 3), data=bytes(24), order=True), "Fortran"),
        (npy("__import__('os')"), "damaged"),
        (npy("(2, 2, 2, 3"), "damaged"),
        (npy("(2, [2, 2), 3]"), "damaged"),
        (npy("{1: 2, 'a': 3}"), "expected uint8|damaged"),
        (b"\x93NUMPY\x03\x00" + bytes(20), "format \\(3, 0\\)"),
        (b"nonsense", "damaged"),
        (b"", "damaged"),
    ],
)
def test_hostile_arrays(tmp_path, contents, words):
    file = tmp_path / "a.npz"
    member(file, contents)
    with pytest.raises(UserError, match=words) as error:
        read(file)
    assert str(file) in str(error.value)


def test_other_files(tmp_path):
    file = tmp_path / "a.npz"
    with pytest.raises(UserError, match="No such file"):
        read(file)
    file.write_bytes(b"no zip file")
    with pytest.raises(UserError, match="damaged or no .npz file"):
        read(file)
    with pytest.raises(UserError, match="damaged or no .npz file"):
        members(file)
    member(file, b"x", "mu.npy")
    with pytest.raises(UserError, match="holds mu.npy, expected arr_0"):
        read(file)
    assert read_comment(tmp_path / "missing") == b""
