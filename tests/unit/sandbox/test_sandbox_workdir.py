"""Files put into a work folder and got from it, whatever hostile code may have left there."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from sandbox import files, holdings
from sandbox.limits import Limits
from sandbox.results import FileRefused, Put
from sandbox.workdir import TreeFolder, contents, make_folders

LIMITS = Limits(files=4, file_mib=1)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "work"
    made.mkdir()
    (tmp_path / "secret").write_bytes(b"secret")
    return made


def put(folder: Path, name: str, data: bytes, limits: Limits = LIMITS) -> None:
    files._write(str(folder), files.checked(name, data, limits, kept=True), limits)


def get(folder: Path, name: str) -> bytes:
    return files._read(str(folder), name, LIMITS)


@pytest.mark.parametrize("name", ["a", "a/b/c", ".hidden", "ä\U0001f600", "a b", "\udcff", "./x"])
def test_what_is_put_can_be_got(folder: Path, name: str) -> None:
    put(folder, name, b"one")
    put(folder, name, b"two")
    assert get(folder, name) == b"two" == (folder / name).read_bytes()
    assert stat.S_IMODE((folder / name).stat().st_mode) & 0o600 == 0o600
    found = contents(str(folder), LIMITS)
    assert found is not None and len(found.files) == 1, "nothing else is left"


@pytest.mark.parametrize(
    "name",
    [
        "", ".", "/", "/etc/passwd", "..", "../secret", "a/../../secret", "a/..", "x\0y", "\ud800",
        "n" * 256, "d/" + "n" * 300, 3, None, b"x",
    ],
)  # fmt: skip
def test_a_name_that_leaves_the_folder_is_refused(folder: Path, name: str) -> None:
    with pytest.raises(FileRefused, match=r"^(put|file)[^\n]*use a relative path"):
        get(folder, name)
    with pytest.raises(FileRefused, match="use a relative path"):
        put(folder, name, b"x")
    assert not list(folder.iterdir())


def test_links_are_not_followed(folder: Path) -> None:
    (folder / "link").symlink_to("../secret")
    (folder / "up").symlink_to("..")
    (folder / "self").symlink_to("self")
    for name in ("link", "self", "up"):
        with pytest.raises(FileRefused, match="no plain file"):
            get(folder, name)
    for name in ("up/secret", "link/x", "self/x"):
        with pytest.raises(FileRefused, match=r"Not a directory|symbolic"):
            get(folder, name)
        with pytest.raises(FileRefused, match=r"Not a directory|symbolic"):
            put(folder, name, b"x", Limits(files=9))
    put(folder, "link", b"mine", Limits(files=9))
    assert (folder / "../secret").read_bytes() == b"secret"
    assert not (folder / "link").is_symlink() and get(folder, "link") == b"mine"


def test_only_plain_files_are_read(folder: Path) -> None:
    os.mkfifo(folder / "fifo")
    (folder / "folder").mkdir()
    names = ["fifo", "folder"]
    if os.geteuid() == 0:
        os.mknod(folder / "device", stat.S_IFCHR | 0o666, os.makedev(1, 5))
        names.append("device")
    for name in names:
        with pytest.raises(FileRefused, match="no plain file"):
            get(folder, name)
    put(folder, "fifo", b"plain")  # a pipe that nobody reads holds nobody up
    assert get(folder, "fifo") == b"plain"
    with pytest.raises(FileRefused, match="Is a directory"):
        put(folder, "folder", b"x")
    with pytest.raises(FileRefused, match="No such file"):
        get(folder, "nothing")
    with pytest.raises(FileRefused, match="Not a directory"):
        put(folder, "fifo/x", b"x", Limits(files=9))


def test_a_file_that_grew_too_large_is_refused(folder: Path) -> None:
    with (folder / "sparse").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(FileRefused, match="more than 1 MiB"):
        get(folder, "sparse")


def test_the_quota_counts_what_is_put(folder: Path) -> None:
    with pytest.raises(FileRefused, match=r"1,048,577 bytes; a session may have 1,048,576"):
        put(folder, "a", bytes((1 << 20) + 1))
    put(folder, "a", bytes(700 << 10))
    with pytest.raises(FileRefused, match="no room; a session may have 4 files and folders, 1 MiB"):
        put(folder, "b", bytes(700 << 10))
    put(folder, "a", bytes(701 << 10))  # in the place of the old one
    for name in ("b", "c", "d"):
        put(folder, name, b"")
    for name in ("e", "d2/e"):
        with pytest.raises(FileRefused, match="no room"):
            put(folder, name, b"")
    assert sorted(os.listdir(folder)) == ["a", "b", "c", "d"]


def test_data_must_be_bytes(folder: Path) -> None:
    put(folder, "a", bytearray(b"x"))
    put(folder, "b", memoryview(b"xy"))
    assert get(folder, "b") == b"xy"
    with pytest.raises(TypeError, match="use bytes, not str"):
        put(folder, "a", "text")  # type: ignore[arg-type]


def test_what_its_owner_may_not_read_is_opened_up_and_counted(folder: Path) -> None:
    (folder / "d" / "e").mkdir(parents=True)
    (folder / "d" / "e" / "f").write_bytes(b"12345")
    for path, mode in (("d/e/f", 0), ("d/e", 0o100), ("d", 0)):
        (folder / path).chmod(mode)
    found = contents(str(folder), Limits())
    assert found is not None and (found.count, found.files["d/e/f"][0]) == (3, 5)
    modes = [stat.S_IMODE((folder / path).stat().st_mode) for path in ("d", "d/e", "d/e/f")]
    assert modes == [0o700, 0o700, 0o400]
    again = contents(str(folder), Limits())
    assert again is not None and again.changed_from(found) == ()


def test_what_changed_is_listed_and_hidden_files_are_not(folder: Path) -> None:
    for name in ("same", "grown", "removed", "replaced"):
        (folder / name).write_bytes(b"x")
    before = contents(str(folder), Limits())
    (folder / "grown").write_bytes(b"xyz")
    (folder / "removed").unlink()
    (folder / "new").write_bytes(b"other")
    (folder / "new").rename(folder / "replaced")
    (folder / "sub").mkdir()
    (folder / "sub" / "made").write_bytes(b"12")
    (folder / ".cache").mkdir()
    for name in (".hidden", ".cache/font", "sub/.hidden"):
        (folder / name).write_bytes(b"x")
    after = contents(str(folder), Limits())
    assert after is not None
    assert after.changed_from(before) == (("grown", 3), ("replaced", 5), ("sub/made", 2))
    assert after.changed_from(after) == ()
    assert len(after.changed_from(None)) == 4


def test_the_list_of_files_is_bounded(folder: Path) -> None:
    for number in range(200):
        (folder / f"{number:03}{'n' * 200}").touch()
    found = contents(str(folder), Limits(files=500))
    assert found is not None
    listed = found.changed_from(None)
    assert 0 < len(listed) <= 64 and sum(len(file.name) for file in listed) <= 1 << 13


def test_the_log_holds_what_was_put() -> None:
    assert files.checked("a//b/./c", b"x", LIMITS, kept=True) == Put("a/b/c", b"x")
    with pytest.raises(FileRefused, match="keeps nothing"):
        files.checked("a", b"x", LIMITS, kept=False)


def test_a_process_with_hidden_files_is_suspected_once_the_file_system_has_grown(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used, hidden, descriptors = [0], [True], [10]
    monkeypatch.setattr(holdings, "used_bytes", lambda _: used[0] << 20)
    monkeypatch.setattr(holdings, "nameless_bytes", lambda *_, **__: None if hidden[0] else 0)
    monkeypatch.setattr(holdings, "num_descriptors", lambda _: descriptors[0])
    process, limits = holdings.Holdings(), Limits(file_mib=16)

    def suspected(grown: int) -> bool:
        used[0] = grown
        assert not process.exceed(os.getpid(), str(folder), limits, running=True)
        return process.may_hoard(os.getpid(), str(folder), limits)

    process.begin(str(folder), limits)
    (folder / "below").mkdir()
    assert [suspected(grown) for grown in (0, 64, 65, 1000)] == [False, False, True, True]
    descriptors[0] = 5
    assert [suspected(grown) for grown in (256, 257)] == [False, True]
    hidden[0] = False
    assert not suspected(1000)


# --- work folders that are used again ---


@pytest.fixture
def tree(tmp_path: Path) -> TreeFolder:
    path = str(tmp_path / "tree")
    return TreeFolder(path, make_folders(path, 2, None))


def test_an_empty_folder_is_used_again_under_another_name(tree: TreeFolder) -> None:
    used = tree.take()
    assert used is not None and tree.take() is None
    os.chmod(used, 0o711)
    number = os.stat(used).st_ino
    assert tree.give_back_empty(used) and not os.path.exists(used)
    again = tree.take()
    assert again is not None and again != used and os.stat(again).st_ino == number
    assert stat.S_IMODE(os.stat(again).st_mode) == 0o700


@pytest.mark.parametrize("left", ["file", ".hidden", "folder", "dangling link"])
def test_a_folder_with_anything_in_it_is_emptied_first(tree: TreeFolder, left: str) -> None:
    used = tree.take()
    assert used is not None
    place = Path(used, left)
    if left == "folder":
        (place / "inner").mkdir(parents=True)
    elif left == "dangling link":
        place.symlink_to("nowhere")
    else:
        place.touch()
    assert not tree.give_back_empty(used) and os.path.lexists(place)
    assert tree.take() is None
    tree.give_back(used)
    again = tree.take()
    assert again is not None and again != used and os.listdir(again) == []


def test_a_folder_that_is_gone_is_not_used_again(tree: TreeFolder) -> None:
    used = tree.take()
    assert used is not None
    os.rmdir(used)
    assert not tree.give_back_empty(used)
    tree.give_back(used)
    assert tree.take() is None
