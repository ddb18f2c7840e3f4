"""adcam.sources: downloads with faults, archives that want out, SBD and COCO conversion, reports."""
import errno, hashlib, http.server, io, json, os, re, shutil, signal, subprocess, sys, tarfile, textwrap, threading, zipfile
from pathlib import Path

import numpy as np, pytest
from hypothesis import given, settings, strategies as st
from PIL import Image
from scipy.io import savemat
from scipy.sparse import csc_array

from adcam import sources as S
from adcam.data import VOC_CLASSES, VOCFolder, coco2014, coco_mask, read_coco, read_mask, voc2012
from adcam.scenes import Scenes, write_voc

DATA = np.random.default_rng(0).bytes(200_000)
MD5, SHA = "md5:" + hashlib.md5(DATA).hexdigest(), "sha256:" + hashlib.sha256(DATA).hexdigest()
ODD = "ein Ordner mit Leerzeichen/ünïcødé 図"  # every tree lies in a folder like this


class Server(http.server.BaseHTTPRequestHandler):
    "DATA with a fault in the first part of the address; `asked` holds (path, Range, If-Range)"
    asked: list = []
    seen: set = set()
    etag = '"one"'
    def log_message(self, *args): pass

    def do_GET(self):
        kind, body, code, extra, cut = self.path.split("/")[1], DATA, 200, {}, None
        self.asked.append((self.path, self.headers.get("Range"), self.headers.get("If-Range")))
        if kind == "gone": return self.send_error(404)
        if kind in ("broken", "refusing"): return self.send_error(500 if kind == "broken" else 416)
        if kind == "corrupt": body = body[:500] + bytes([body[500] ^ 1]) + body[501:]
        if kind == "page": body, extra = b"<html>please log in</html>", {"Content-Type": "text/html"}
        m = re.match(r"bytes=(\d+)-", self.headers.get("Range") or "")
        start = int(m[1]) if m and kind not in ("plain", "page") else 0
        if self.headers.get("If-Range") not in (None, self.etag): start = 0
        if start >= len(body):
            self.send_response(416); self.send_header("Content-Range", f"bytes */{len(body)}"); self.send_header("Content-Length", "0")
            return self.end_headers()
        if start: code, extra = 206, {"Content-Range": f"bytes {start + (kind == 'shifted')}-{len(body) - 1}/{len(body)}"}
        if kind == "always-short" or kind == "short" and self.path not in self.seen: cut = 70_000 if not start else 0
        self.seen.add(self.path)
        self.send_response(code)
        for k, v in ({"Content-Length": str(len(body) - start), "ETag": self.etag} if kind != "unsized" else {}).items(): self.send_header(k, v)
        for k, v in extra.items(): self.send_header(k, v)
        self.end_headers()
        self.wfile.write(body[start:][:cut])


@pytest.fixture
def server(monkeypatch):
    "Address of a server with fresh counters"
    kind = type("Fresh", (Server,), dict(asked=[], seen=set()))
    s = http.server.ThreadingHTTPServer(("127.0.0.1", 0), kind)
    threading.Thread(target=s.serve_forever, kwargs=dict(poll_interval=.02), daemon=True).start()
    monkeypatch.setattr(S, "_WAIT", 0)
    s.kind, s.at = kind, f"http://127.0.0.1:{s.server_port}"
    yield s
    s.shutdown(); s.server_close()


@pytest.fixture
def odd(tmp_path):
    (tmp_path / ODD).mkdir(parents=True)
    return tmp_path / ODD


def fetch(*args, **kw): return S.download(*args, progress=False, **kw)


# ---- the tables

def test_every_source_has_mirrors_of_one_file_a_checksum_and_a_license():
    assert {"voc2012", "voc2012_test", "sbd", "coco2014_train", "coco2014_val", "coco2014_annotations"} == set(S.SOURCES)
    assert [n for n, s in (S.SOURCES | S.WEIGHTS).items() if not s.urls] == ["conformer_official"]  # links of Google Drive are no address
    for name, s in (S.SOURCES | S.WEIGHTS).items():
        if not s.urls: continue
        assert len(s.urls) > 1 and len(set(s.urls)) == len(s.urls) and all(u.endswith("/" + s.file) for u in s.urls), name
        assert s.license and s.code and s.page.startswith("http") and s.what
        S._split_checksum(s.checksum)
    assert S.SOURCES["voc2012"].checksum == "md5:6cd6e144f989b92b3379bac3b3de84fd" and S.SOURCES["sbd"].checksum == "md5:82b4d87ceb2ed10f6038a1cba92111cb"


def test_weights_table_is_what_the_command_prints():
    rows = {r["name"]: r for r in S.weights_table()}
    assert rows["conformer_small"]["checksum"] == "sha256:3065dcf5*" and "3065dcf5" in rows["conformer_small"]["file"]
    assert "Apache-2.0" in rows["conformer_small"]["code"] and all(r["license"] and r["url"] and r["page"] for r in rows.values())


@given(st.binary(max_size=50), st.integers(6, 40))
def test_prefix_checksums_accept_the_file_and_nothing_else(tmp_path_factory, content, digits):
    path = tmp_path_factory.getbasetemp() / "x"
    path.write_bytes(content)
    right = hashlib.sha256(content).hexdigest()
    S.verify(path, f"sha256:{right[:digits]}*"); S.verify(path, f"SHA256:{right.upper()}"); S.verify(path, right)
    wrong = ("0" if right[0] != "0" else "1") + right[1:]
    for w in (wrong, f"{wrong[:digits]}*"):
        with pytest.raises(ValueError, match="not the published file"): S.verify(path, f"sha256:{w}")


@pytest.mark.parametrize("bad", ["md5:12", "sha256:xyz*", "sha256:12345*", "crc32:12345678", "", "md5:" + "0" * 64])
def test_checksums_that_mean_nothing_are_refused(bad):
    with pytest.raises(ValueError, match="not understood"): S._split_checksum(bad)


# ---- downloads

@pytest.mark.parametrize("checksum", [MD5, SHA, SHA[:15] + "*"])
def test_download_leaves_the_file_and_nothing_else(server, odd, checksum):
    path = fetch(f"{server.at}/good/a%20file.bin", odd, checksum=checksum)
    assert path == odd / "a file.bin" and path.read_bytes() == DATA and os.listdir(odd) == ["a file.bin"]
    n = len(server.kind.asked)
    assert fetch(f"{server.at}/good/a%20file.bin", odd, checksum=checksum) == path and len(server.kind.asked) == n  # it is there


def test_connection_that_closes_early_is_continued(server, odd):
    assert fetch(f"{server.at}/short/f", odd / "f", checksum=MD5).read_bytes() == DATA
    (_, first, _), (_, second, if_range) = server.kind.asked
    assert first is None and second == "bytes=65536-" and if_range == '"one"'  # whole blocks of 64 KB were kept


def test_partial_file_of_an_earlier_run_is_continued(server, odd):
    with pytest.raises(ConnectionError, match="kept in f.part; run again"): fetch(f"{server.at}/always-short/f", odd / "f", checksum=MD5)
    kept = (odd / "f.part").stat().st_size
    assert 0 < kept < len(DATA) and not (odd / "f").exists()
    assert fetch(f"{server.at}/good/f", odd / "f", checksum=MD5).read_bytes() == DATA
    assert server.kind.asked[-1][1] == f"bytes={kept}-" and os.listdir(odd) == ["f"]


def test_a_connection_that_breaks_often_but_brings_something_is_not_given_up(server, odd, monkeypatch):
    real = server.kind.do_GET
    def flaky(self):
        write = self.wfile.write
        self.wfile.write = lambda b: write(b[:70_000] if len(b) > 1000 else b)
        real(self)
    monkeypatch.setattr(server.kind, "do_GET", flaky)
    assert fetch(f"{server.at}/good/f", odd / "f", checksum=MD5).read_bytes() == DATA and len(server.kind.asked) == 3
    with pytest.raises(ConnectionError): fetch(f"{server.at}/plain/f", odd / "g", checksum=MD5)  # starts over each time, so nothing is gained
    assert len(server.kind.asked) == 3 + 1 + 3


@pytest.mark.parametrize("kind", ["plain", "unsized"])
def test_server_without_ranges_or_sizes(server, odd, kind):
    (odd / "f.part").write_bytes(DATA[:1000])
    assert fetch(f"{server.at}/{kind}/f", odd / "f", checksum=MD5).read_bytes() == DATA
    assert [a[1] for a in server.kind.asked] == ["bytes=1000-"]


@pytest.mark.parametrize("part", [DATA, DATA + b"more", b"other" * 100, b"other" * 100_000])
def test_parts_that_are_complete_too_long_or_of_another_file(server, odd, part):
    (odd / "f.part").write_bytes(part)
    assert fetch(f"{server.at}/good/f", odd / "f", checksum=SHA).read_bytes() == DATA
    assert os.listdir(odd) == ["f"]


def test_without_a_checksum_a_part_is_continued_only_if_the_server_says_it_is_the_same(server, odd):
    def asked(): return server.kind.asked[-1][1:]
    (odd / "f.part").write_bytes(DATA[:1000])
    fetch(f"{server.at}/good/f", odd / "f", unverified=True)
    assert asked() == (None, None)  # nobody knows where that part came from
    for etag, resumed in (('"one"', True), ('"two"', False)):
        (odd / "g").unlink(missing_ok=True)
        (odd / "g.part").write_bytes(DATA[:1000] if resumed else b"x" * 1000)
        (odd / "g.part.json").write_text(json.dumps(dict(url=f"{server.at}/good/g", mark='"one"')))
        server.kind.etag = etag
        assert fetch(f"{server.at}/good/g", odd / "g", unverified=True).read_bytes() == DATA
        assert asked() == ("bytes=1000-", '"one"')


def test_mirrors_in_turn_and_why_each_failed(server, odd, capsys):
    closed = "http://127.0.0.1:9"  # nothing listens there
    urls = [f"{closed}/f", *(f"{server.at}/{k}/f" for k in ("gone", "broken", "refusing", "page", "corrupt"))]
    with pytest.raises(ConnectionError) as e: fetch(urls, odd / "f", checksum=MD5)
    for word in (*urls, "cannot be reached", "404", "500", "as if it were a part", "web page", "does not match", "By hand", str(odd / "f"), "--local"):
        assert word in str(e.value)
    assert os.listdir(odd) == []
    assert fetch([*urls, f"{server.at}/good/f"], odd / "f", checksum=MD5).read_bytes() == DATA


def test_server_that_answers_with_another_part_is_left(server, odd):
    (odd / "f.part").write_bytes(DATA[:1000])
    with pytest.raises(ConnectionError, match="asked for byte 1000"): fetch(f"{server.at}/shifted/f", odd / "f", checksum=MD5)
    assert not (odd / "f").exists() and (odd / "f.part").read_bytes() == DATA[:1000]


@pytest.mark.parametrize("checksum", [MD5, SHA[:15] + "*"])
def test_corrupt_file_is_an_error_and_not_kept(server, odd, checksum):
    with pytest.raises(ValueError, match="could not get f"): fetch(f"{server.at}/corrupt/f", odd / "f", checksum=checksum)
    assert os.listdir(odd) == []


def test_wrong_file_that_is_there_is_moved_aside(server, odd, capsys):
    (odd / "f").write_bytes(b"rubbish")
    assert fetch(f"{server.at}/good/f", odd / "f", checksum=MD5).read_bytes() == DATA
    assert (odd / "f.bad").read_bytes() == b"rubbish" and "moved to f.bad" in capsys.readouterr().out


def test_local_file_comes_first(server, odd):
    (odd / "mine.tar").write_bytes(DATA)
    assert fetch(f"{server.at}/good/f", odd / "f", checksum=MD5, local=odd / "mine.tar") == odd / "mine.tar" and not server.kind.asked
    (odd / "mine.tar").write_bytes(DATA[:-1])
    with pytest.raises(ValueError, match="mine.tar is not the published file"): fetch(f"{server.at}/good/f", odd / "f", checksum=MD5, local=odd / "mine.tar")
    with pytest.raises(FileNotFoundError, match="no local file"): fetch("sbd", odd, local=odd / "nothing")


def test_unknown_checksum_needs_a_word(server, odd, capsys):
    with pytest.raises(ValueError, match="unverified=True"): fetch(f"{server.at}/good/f", odd / "f")
    fetch(f"{server.at}/good/f", odd / "f", unverified=True)
    assert SHA in capsys.readouterr().out
    with pytest.raises(ValueError, match="by hand from https://github.com"): fetch("conformer_official", odd)
    for bad in ("voc2007", "ftp://x/y", [], "/etc/passwd"):
        with pytest.raises(ValueError, match="no source"): fetch(bad, odd / "f", unverified=True)


class Full:
    "A file on a disk that is full after `room` bytes"
    def __init__(self, f, room): self.f, self.room = f, room
    def __enter__(self): return self
    def __exit__(self, *a): self.f.close()
    def __getattr__(self, name): return getattr(self.f, name)
    def write(self, b):
        self.room -= len(b)
        if self.room < 0: raise OSError(errno.ENOSPC, "No space left on device")
        return self.f.write(b)


def test_full_disk_while_downloading_is_named_and_the_part_kept(server, odd, monkeypatch):
    monkeypatch.setattr(S, "open", lambda p, m: Full(open(p, m), 100_000), raising=False)
    with pytest.raises(OSError, match="disk full while downloading f to .*kept in f.part") as e:
        fetch([f"{server.at}/good/f", f"{server.at}/plain/f"], odd / "f", checksum=MD5)
    assert e.value.errno == errno.ENOSPC and len(server.kind.asked) == 1  # the next mirror would not help
    assert (odd / "f.part").read_bytes() == DATA[:65536] and not (odd / "f").exists()
    monkeypatch.undo()
    assert fetch(f"{server.at}/good/f", odd / "f", checksum=MD5).read_bytes() == DATA and server.kind.asked[-1][1] == "bytes=65536-"


def test_disk_that_would_become_full_is_said_before(server, odd, monkeypatch):
    monkeypatch.setattr(S.shutil, "disk_usage", lambda p: type("U", (), dict(free=1000)))
    with pytest.raises(OSError, match="1.0 KB free, 200.0 KB are needed"): fetch(f"{server.at}/good/f", odd / "f", checksum=MD5)


# ---- archives

def make_tar(path, entries):
    with tarfile.open(path, "w:gz" if str(path).endswith("gz") else "w") as t:
        for name, content in entries.items():
            m = tarfile.TarInfo(name)
            if isinstance(content, tuple): (m.type, m.linkname), content = content, b""
            m.size = len(content)
            t.addfile(m, io.BytesIO(content))
    return path


def make_zip(path, entries):
    with zipfile.ZipFile(path, "w") as z:
        for name, content in entries.items(): z.writestr(name, content)
    return path


def files(root): return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


GOOD = {"top/a.txt": b"one", "top/sub dir/ü.bin": DATA, "other/b": b"two", "top/empty": b""}

@pytest.mark.parametrize("make,name", [(make_tar, "a.tar"), (make_tar, "a.tgz"), (make_zip, "a.zip"), (make_zip, "zip without suffix")])
def test_unpack_whole_part_and_again(odd, make, name):
    archive = make(odd / name, GOOD)
    assert S.unpack(archive, odd / "all", progress=False) == dict(written=4, there=0) and files(odd / "all") == GOOD
    assert S.unpack(archive, odd / "top", "top", progress=False)["written"] == 3
    assert files(odd / "top") == {k[4:]: v for k, v in GOOD.items() if k.startswith("top/")}
    (odd / "all/top/sub dir/ü.bin").write_bytes(DATA[:100]); (odd / "all/other/b").unlink()
    assert S.unpack(archive, odd / "all", progress=False) == dict(written=2, there=2) and files(odd / "all") == GOOD


SYM, HARD = tarfile.SYMTYPE, tarfile.LNKTYPE
EVIL = [("../evil", b"x", "leads out"), ("a/../../evil", b"x", "leads out"), ("/evil", b"x", "absolute"), ("C:/evil", b"x", "absolute"),
        ("a\\..\\evil", b"x", "leads out"),
        ("link", (SYM, "../../secret"), "link out of the archive"), ("link", (SYM, "/etc/passwd"), "link out of the archive"),
        ("link", (HARD, "../secret"), "link out of the archive"),
        ("link", (SYM, "nowhere"), "does not hold"), ("link", (SYM, "link"), "folder or to itself"),
        ("pipe", (tarfile.FIFOTYPE, ""), "device or pipe"), ("dev", (tarfile.CHRTYPE, ""), "device or pipe")]

@pytest.mark.parametrize("name,content,why", EVIL)
def test_tar_that_wants_out_is_refused_by_name_and_leaves_nothing(odd, name, content, why):
    archive = make_tar(odd / "evil.tar", {"fine": b"fine", name: content})
    with pytest.raises(ValueError, match=why) as e: S.unpack(archive, odd / "in/dest", progress=False)
    assert repr(name) in str(e.value) and os.listdir(odd) == ["evil.tar"]


@pytest.mark.parametrize("name", ["../evil", "/evil", "a/../../evil", "C:\\evil", "..\\evil"])
def test_zip_that_wants_out(odd, name):
    with pytest.raises(ValueError, match="evil.zip was not unpacked"):
        S.unpack(make_zip(odd / "evil.zip", {"fine": b"x", name: b"x"}), odd / "dest", progress=False)
    link = zipfile.ZipInfo("link"); link.external_attr = 0o120777 << 16
    with pytest.raises(ValueError, match="'link' is a symbolic link"): S.unpack(make_zip(odd / "l.zip", {link: "/etc/passwd"}), odd / "dest", progress=False)
    assert sorted(os.listdir(odd)) == ["evil.zip", "l.zip"]


def test_links_inside_become_copies_and_links_on_disk_are_not_followed(odd):
    archive = make_tar(odd / "a.tar", {"d/a": b"one", "d/s": (SYM, "a"), "h": (HARD, "d/a"), "x/y": (SYM, "../d/s")})
    S.unpack(archive, odd / "dest", progress=False)
    assert files(odd / "dest") == dict.fromkeys(("d/a", "d/s", "h", "x/y"), b"one") and not any(p.is_symlink() for p in (odd / "dest").rglob("*"))
    (odd / "outside").mkdir(); (odd / "trap").mkdir(); (odd / "trap/d").symlink_to(odd / "outside")
    for trap in (archive, make_zip(odd / "a.zip", {"d/a": b"one"})):
        with pytest.raises(ValueError, match="there is a link out of"): S.unpack(trap, odd / "trap", progress=False)
    assert os.listdir(odd / "outside") == []


@pytest.mark.parametrize("make,name,cut",
                         [(make_tar, "a.tar", 512), (make_tar, "a.tar", 30_000), (make_tar, "a.tar", 1024), (make_tar, "a.tgz", 30_000),
                          (make_zip, "a.zip", 30_000), (make_tar, "a.tar", 0), (make_tar, "a.tgz", 5)])
def test_truncated_archives_are_named(odd, make, name, cut):
    raw = make(odd / name, GOOD).read_bytes()
    (odd / name).write_bytes(raw[:cut])
    with pytest.raises(ValueError, match=re.escape(name) + " cannot be unpacked"): S.unpack(odd / name, odd / "dest", progress=False)


def test_damaged_archives_are_named_and_no_half_file_is_left(odd):
    raw = bytearray(make_zip(odd / "a.zip", GOOD).read_bytes())
    raw[5000] ^= 1
    (odd / "a.zip").write_bytes(raw)
    with pytest.raises(ValueError, match="a.zip cannot be unpacked"): S.unpack(odd / "a.zip", odd / "dest", progress=False)
    assert all(GOOD[k] == v for k, v in files(odd / "dest").items()) and len(files(odd / "dest")) < 4
    with pytest.raises(FileNotFoundError, match="no archive"): S.unpack(odd / "none.zip", odd, progress=False)
    with pytest.raises(ValueError, match=r"holds \['other', 'top'\]"): S.unpack(make_zip(odd / "b.zip", GOOD), odd / "d", "VOCdevkit", progress=False)


def test_full_disk_while_unpacking(odd, monkeypatch):
    archive = make_tar(odd / "a.tar", GOOD)
    real = S.atomic_write
    monkeypatch.setattr(S, "atomic_write", lambda p, w: real(p, lambda f: w(Full(f, 1000))))
    with pytest.raises(OSError, match="disk full while unpacking a.tar") as e: S.unpack(archive, odd / "dest", progress=False)
    assert e.value.errno == errno.ENOSPC and files(odd / "dest") == {"top/a.txt": b"one"}  # complete files only, no leftovers
    monkeypatch.undo()
    assert S.unpack(archive, odd / "dest", progress=False) == dict(written=3, there=1)


@settings(deadline=None, max_examples=25)
@given(st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1,
                        max_size=12) | st.sampled_from(["..", "../x", "/x", "a/../../b", ".", "./..", "~/x"]), min_size=1, max_size=3))
def test_no_name_ever_leads_out(tmp_path_factory, parts):
    base = tmp_path_factory.mktemp("n"); name = "/".join(parts)
    archive = make_tar(base / "a.tar", {name: b"x"})
    try: S.unpack(archive, base / "in/dest", progress=False)
    except (ValueError, OSError): pass
    assert {p.relative_to(base).parts[:2] for p in base.rglob("*") if p.is_file()} <= {("a.tar",), ("in", "dest")}


# ---- SBD

def write_sbd(path, mask):
    path.parent.mkdir(parents=True, exist_ok=True)
    edges = np.empty((20, 1), object)
    for c in range(20): edges[c, 0] = csc_array(mask.shape, dtype=bool)
    savemat(path, dict(GTcls=dict(Boundaries=edges, Segmentation=mask, CategoriesPresent=np.unique(mask)[:, None])), do_compression=True)


def draw_toy(root):
    "12 scenes: VOC train 0-3, VOC val 4-5, SBD train 2-7, SBD val 8-10, 11 in no list; own masks have a row of 255"
    ds, voc, sbd = SCENES, write_voc(root / "VOC2012", "val", 12, 64), root / "sbd"
    for i in range(2, 11): write_sbd(sbd / f"cls/{ds.ids[i]}.mat", ds[i].mask)
    for i in range(12):
        path = voc / f"SegmentationClass/{ds.ids[i]}.png"
        S._write_mask(path, np.where(np.arange(64)[:, None] == 0, np.uint8(255), ds[i].mask)) if i < 6 else path.unlink()
    for path, ids in {voc / "ImageSets/Segmentation/train.txt": range(4), voc / "ImageSets/Segmentation/val.txt": range(4, 6),
                      sbd / "train.txt": range(2, 8), sbd / "val.txt": range(8, 11)}.items():
        path.write_text("".join(f"{ds.ids[i]}\n" for i in ids))
    (voc / "Annotations").mkdir()
    for i in range(12):
        (voc / f"Annotations/{ds.ids[i]}.xml").write_text("<a>"
                                                          + "".join(f"<object><name>{VOC_CLASSES[k]}</name></object>" for k in np.flatnonzero(ds[i].label)) + "</a>")


SCENES = Scenes("val", 12, 64)
TOY: list[Path] = []  # the tree is drawn once and copied

@pytest.fixture(scope="session", autouse=True)
def toy_drawn(tmp_path_factory):
    TOY[:] = [tmp_path_factory.mktemp("toy")]
    draw_toy(TOY[0])


def toy_voc(root):
    "A copy of that tree: scenes, VOC folder, SBD folder"
    shutil.copytree(TOY[0], root, dirs_exist_ok=True)
    return SCENES, root / "VOC2012", root / "sbd"


def test_train_aug_is_the_union_without_voc_val(odd):
    ds, voc, sbd = toy_voc(odd)
    assert S.train_aug_list(voc, sbd, strict=False) == [ds.ids[i] for i in (0, 1, 2, 3, 6, 7, 8, 9, 10)]
    path = voc / "ImageSets/Segmentation/train_aug.txt"
    path.unlink()
    said = ("VOC train has 4 images instead of 1,464; VOC val has 2 .*SBD train has 6 images instead of 8,498; SBD val has 3 .*"
            "train_aug has 9 images instead of 10,582")
    with pytest.raises(ValueError, match=said):
        S.train_aug_list(voc, sbd)
    assert not path.exists()


def test_full_size_lists_give_10582(odd):
    "Lists of the published lengths that overlap as the real ones do: 2,237 of SBD are in VOC's train or val"
    voc, sbd, ids = odd / "VOC2012", odd / "sbd", [f"2008_{i:06d}" for i in range(12_031)]
    (voc / "ImageSets/Segmentation").mkdir(parents=True); (sbd / "cls").mkdir(parents=True)
    shared = ids[464:464 + 2237] + ids[2913:]  # 1,000 of VOC train, 1,237 of VOC val, all 9,118 others
    rng = np.random.default_rng(0); rng.shuffle(shared)
    for path, part in {voc / "ImageSets/Segmentation/train.txt": ids[:1464], voc / "ImageSets/Segmentation/val.txt": ids[1464:2913],
                       sbd / "train.txt": shared[:8498], sbd / "val.txt": shared[8498:]}.items():
        path.write_text("\n".join(part) + "\n")
    aug = S.train_aug_list(voc, sbd)
    assert len(aug) == 10_582 and not set(aug) & set(ids[1464:2913]) and aug == sorted(aug)
    (sbd / "val.txt").write_text("\n".join(shared[8498:-30]) + "\n")
    with pytest.raises(ValueError, match=r"SBD val has 2,827 images instead of 2,857; train_aug has 10,5\d\d"): S.train_aug_list(voc, sbd)


def test_sbd_masks_voc_wins_and_a_second_run_does_nothing(odd):
    ds, voc, sbd = toy_voc(odd)
    assert S.sbd_to_masks(sbd, voc, num_classes=10, progress=False) == S.Converted(11, 0, [])
    out = voc / "SegmentationClassAug"
    for i in range(11):
        mask = read_mask(out / f"{ds.ids[i]}.png", 10)
        assert (mask[0] == 255).all() == (i < 6) and np.array_equal(mask[1:], ds[i].mask[1:])
        with Image.open(out / f"{ds.ids[i]}.png") as im: assert im.mode == "P" and im.getpalette()[:6] == [0, 0, 0, 128, 0, 0]
    first = files(out)
    assert S.sbd_to_masks(sbd, voc, num_classes=10, progress=False) == S.Converted(0, 11, []) and files(out) == first
    # processes give the same bytes
    assert S.sbd_to_masks(odd, voc, odd / "two", num_classes=10, processes=2, progress=False).written == 11 and files(odd / "two") == first


def test_one_bad_image_does_not_lose_the_others(odd):
    ds, voc, sbd = toy_voc(odd)
    (sbd / f"cls/{ds.ids[7]}.mat").write_bytes(b"MATLAB 5.0 MAT-file" + b"x" * 500)
    (sbd / f"cls/{ds.ids[8]}.mat").unlink()
    write_sbd(sbd / f"cls/{ds.ids[9]}.mat", np.zeros((10, 12), np.uint8))
    (voc / f"JPEGImages/{ds.ids[10]}.jpg").write_bytes(b"no jpeg")
    done = S.sbd_to_masks(sbd, voc, num_classes=10, progress=False)
    assert done.written == 7 and [s.id for s in done.skipped] == [ds.ids[i] for i in (7, 8, 9, 10)]
    for word, s in zip(("cannot read SBD mask", ".mat", "is 10x12, its image 64x64", "cannot read image"), done.skipped): assert word in s.reason
    assert "4 of 11 images were skipped" in str(done)


def test_full_disk_stops_the_conversion(odd, monkeypatch):
    _, voc, sbd = toy_voc(odd)
    def full(path, mask): raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(S, "_write_mask", full)
    with pytest.raises(OSError, match="disk full while writing masks") as e: S.sbd_to_masks(sbd, voc, num_classes=10, progress=False)
    assert e.value.errno == errno.ENOSPC
    with pytest.raises(ValueError, match="processes is 0"): S.sbd_to_masks(sbd, voc, num_classes=10, processes=0)


def test_read_sbd_refuses_other_mat_files(odd):
    savemat(odd / "a.mat", dict(GTcls=dict(Segmentation=np.ones((3, 3)))))
    with pytest.raises(ValueError, match="float64"): S.read_sbd(odd / "a.mat")
    savemat(odd / "b.mat", dict(GTinst=1))
    with pytest.raises(ValueError, match="GTcls"): S.read_sbd(odd / "b.mat")
    with pytest.raises(FileNotFoundError): S.read_sbd(odd / "none.mat")
    with pytest.raises(FileNotFoundError, match="no SBD in"): S.sbd_to_masks(odd, odd)


@settings(deadline=None, max_examples=80)
@given(st.integers(0, 10**6), st.integers(1, 255), st.integers(0, 10**6))
def test_a_damaged_byte_is_an_error_or_harmless_never_a_crash(tmp_path_factory, where, flip, cut):
    "Without the check of the zlib streams, loadmat ends the process by a segmentation fault on some of these"
    base, good = tmp_path_factory.getbasetemp() / "fuzz", np.arange(30, dtype=np.uint8).reshape(5, 6) % 21
    if not (base / "good.mat").exists(): write_sbd(base / "good.mat", good)
    raw = bytearray((base / "good.mat").read_bytes())
    raw[where % len(raw)] ^= flip
    (base / "bad.mat").write_bytes(raw[:len(raw) - (cut % len(raw) if cut % 3 == 0 else 0)])
    try: mask = S.read_sbd(base / "bad.mat")
    except ValueError as e: assert "bad.mat" in str(e)
    else: assert np.array_equal(mask, good)


# ---- COCO

def toy_coco(root, n=6, split="val2014"):
    "Image 1: overlapping squares; 2: square and crowd; the others nothing"
    def square(l, t, r, b): return [[l, t, r, t, r, b, l, b]]
    for sub in ("annotations", split): (root / sub).mkdir(parents=True, exist_ok=True)
    images = [dict(id=i, width=48, height=32, file_name=f"COCO_{split}_{i:012d}.jpg") for i in range(1, n + 1)]
    what = [(1, 3, square(4, 4, 30, 28), 0), (1, 7, square(20, 10, 44, 30), 0), (2, 90, square(30, 5, 40, 20), 0),
            (2, 3, dict(size=[32, 48], counts=[0, 32 * 12, 32 * 36]), 1)]
    anns = [dict(id=j, image_id=i, category_id=c, segmentation=s, iscrowd=k, area=1, bbox=[0, 0, 1, 1]) for j, (i, c, s, k) in enumerate(what, 1)]
    cats = [dict(id=c, name=x) for c, x in ((7, "train"), (3, "car"), (90, "hair drier"))]
    (root / f"annotations/instances_{split}.json").write_text(json.dumps(dict(images=images, annotations=anns, categories=cats)))
    for i in images: Image.fromarray(np.full((32, 48, 3), i["id"] * 9 % 256, np.uint8)).save(root / split / i["file_name"])
    return root


def test_coco_masks_are_those_of_the_reader_and_make_a_voc_folder(odd):
    root = toy_coco(odd / "coco")
    assert S.coco_to_voc(root, "val", progress=False) == S.Converted(6, 0, [])
    coco, ds, folder = read_coco(root / "annotations/instances_val2014.json"), coco2014(root, "val", strict=False), VOCFolder(root, "val")
    for i in range(6):
        want = coco_mask(coco, i + 1)
        assert np.array_equal(ds[i].mask, want) and np.array_equal(folder[i].mask, want) and np.array_equal(folder[i].label, ds[i].label)
    assert folder.classes == ("car", "train", "hair drier") and folder[0].label.tolist() == [1, 1, 0] and folder[1].label.tolist() == [0, 0, 1]
    assert folder[0].mask[15, 25] == 2 and folder[0].mask[6, 6] == 1 and set(np.unique(folder[1].mask)) == {0, 3}
    a, b = (root / d / f"{ds.ids[0]}.jpg" for d in ("val2014", "JPEGImages"))
    assert a.samefile(b)  # linked, not copied
    toy_coco(root, 3, "train2014")
    assert S.coco_to_voc(root, "train2014", odd / "out", processes=2, progress=False).written == 3
    S.coco_to_voc(root, "val", odd / "out", link=False, progress=False)  # the second split keeps the labels of the first
    table = (odd / "out/ImageSets/labels.csv").read_text().splitlines()
    assert table[0] == "id,car,train,hair drier" and len(table) == 10 and len(VOCFolder(odd / "out", "train")) == 3


def test_coco_bad_images_are_reported_and_taken_in_again(odd):
    root = toy_coco(odd / "coco")
    name = "COCO_val2014_{:012d}".format
    (root / f"val2014/{name(3)}.jpg").unlink(); (root / f"val2014/{name(4)}.jpg").write_bytes(b"torn")
    Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(root / f"val2014/{name(5)}.jpg")
    done = S.coco_to_voc(root, "val", progress=False)
    assert done.written == 3
    assert [s.id for s in done.skipped] == [name(i) for i in (3, 4, 5)]
    assert "is 9x9, its annotations are for 32x48" in done.skipped[2].reason
    assert VOCFolder(root, "val").ids == [name(i) for i in (1, 2, 6)]
    toy_coco(root)
    assert S.coco_to_voc(root, "val", progress=False) == S.Converted(3, 3, []) and len(VOCFolder(root, "val")) == 6


def test_coco_annotations_that_cannot_be_painted_and_foreign_folders(odd):
    root = toy_coco(odd / "coco")
    path = root / "annotations/instances_val2014.json"
    d = json.loads(path.read_text()); d["annotations"][0]["segmentation"] = "nonsense"; path.write_text(json.dumps(d))
    done = S.coco_to_voc(root, "val", progress=False)
    assert [s.id for s in done.skipped] == ["COCO_val2014_000000000001"] and "its outline is str" in done.skipped[0].reason
    with pytest.raises(FileNotFoundError, match="instances_train2014.json"): S.coco_to_voc(root, "train", progress=False)
    (odd / "other").mkdir(); (odd / "other/classes.txt").write_text("a\nb\n")
    with pytest.raises(ValueError, match="names other classes"): S.coco_to_voc(root, "val", odd / "other", progress=False)


def test_killed_conversion_leaves_no_half_file_and_continues(odd):
    root = toy_coco(odd / "coco", 20)
    script = textwrap.dedent("""
        import os, signal, sys
        from adcam import sources as S
        real, n = S.atomic_write, 0
        def dying(path, write):
            global n
            n += path.suffix == ".png"
            if n < 8: return real(path, write)
            def half(f): write(f); f.flush(); os.ftruncate(f.fileno(), f.tell() // 2); os.kill(os.getpid(), signal.SIGKILL)
            return real(path, half)
        S.atomic_write = dying
        S.coco_to_voc(sys.argv[1], "val", link=False, progress=False)
    """)
    p = subprocess.run([sys.executable, "-c", script, str(root)], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert p.returncode == -signal.SIGKILL, p.stderr
    there = sorted((root / "SegmentationClass").glob("*.png"))
    assert len(there) == 7 and all(read_mask(m, 3, (32, 48)) is not None for m in there) and not (root / "ImageSets").exists()
    assert S.coco_to_voc(root, "val", link=False, progress=False) == S.Converted(13, 7, [])
    whole = toy_coco(odd / "whole", 20)
    S.coco_to_voc(whole, "val", progress=False)
    assert {k: v for k, v in files(root / "SegmentationClass").items() if k.endswith(".png")} == files(whole / "SegmentationClass")


# ---- reports, and all steps in one

def test_check_says_what_is_missing_and_how_to_get_it(odd):
    ds, voc, sbd = toy_voc(odd)
    report = S.check_tree("voc2012", odd, strict=False)
    assert not report.ok and {r.source for r in report.rows if not r.ok} == {"convert"} and f"adcam data convert voc2012 {odd}" in str(report)
    S.convert_voc(odd, num_classes=10, strict=False, progress=False)
    report = S.check_tree("voc2012", odd, strict=False, deep=True)
    assert report.ok and "complete" in str(report).splitlines()[0] and "NOT" not in str(report)
    assert not S.check_tree("voc2012", odd).ok and "4 of 1,464" in str(S.check_tree("voc2012", odd))  # a toy is no VOC
    (voc / f"JPEGImages/{ds.ids[1]}.jpg").unlink(); (voc / f"Annotations/{ds.ids[2]}.xml").write_bytes(b"")
    text = str(S.check_tree("voc2012", odd, strict=False))
    assert f"missing {ds.ids[1]}; adcam data get voc2012" in text and f"missing {ds.ids[2]};" in text


def test_check_deep_finds_torn_files(odd):
    ds, voc, _ = toy_voc(odd)
    S.convert_voc(odd, num_classes=10, strict=False, progress=False)
    path = voc / f"JPEGImages/{ds.ids[8]}.jpg"
    path.write_bytes(path.read_bytes()[:700])
    assert S.check_tree("voc2012", odd, strict=False).ok
    report = S.check_tree("voc2012", odd, strict=False, deep=True)
    assert not report.ok and ds.ids[8] in str(report) and "8 of 9" in str(report)


def test_check_tree_of_coco_counts_images_and_names_a_lost_one(odd):
    root = toy_coco(toy_coco(odd / "coco"), 2, "train2014")
    assert S.check_tree("coco2014", root, strict=False, deep=True).ok
    whole = S.check_tree("coco2014", root)
    assert "2 of 82,783" in str(whole) and not whole.ok
    (root / "train2014/COCO_train2014_000000000002.jpg").unlink()
    assert [r.source for r in S.check_tree("coco2014", root, strict=False).rows if not r.ok] == ["coco2014_train"]


def test_check_tree_of_a_folder_asks_for_the_table_of_labels(odd):
    mine = odd / "mine"; mine.mkdir()
    Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(mine / "a b.png")
    found = S.check_tree("folder", mine)
    assert "labels.csv" in str(found) and not found.ok
    (mine / "labels.csv").write_text("id,labels\na b,cat\n")
    assert S.check_tree("folder", mine, deep=True).ok


def test_check_tree_of_nothing_says_how_to_get_it(odd):
    found = S.check_tree("voc2012", odd / "nowhere")
    assert not found.ok and "adcam data get voc2012" in str(found)


def test_check_tree_of_an_unknown_data_set(odd):
    with pytest.raises(ValueError, match="choose one of"): S.check_tree("imagenet", odd)


def published(odd):
    "The toy tree packed as the publishers do, with sources that know its checksum but not its address"
    _, voc, sbd = toy_voc(odd / "made")
    out = {}
    for name, folder, prefix in (("voc2012", voc, "VOCdevkit/VOC2012"), ("sbd", sbd, "benchmark_RELEASE/dataset")):
        path = odd / S.SOURCES[name].file
        with tarfile.open(path, "w:gz" if path.suffix == ".tgz" else "w") as t: t.add(folder, prefix)
        out[name] = S.SOURCES[name]._replace(urls=("http://127.0.0.1:9/" + path.name,), checksum="md5:" + hashlib.md5(path.read_bytes()).hexdigest())
    return dict(out, voc2012_test=S.SOURCES["voc2012_test"])


def test_get_from_local_archives_converts_and_is_done_the_second_time(odd):
    sources = published(odd)
    local = [odd / sources[n].file for n in ("voc2012", "sbd")]
    with pytest.raises(ConnectionError, match="By hand"): S.get("voc2012", odd / "tree", strict=False, progress=False, sources=sources)
    with pytest.raises(ValueError, match="none of the files that are needed"): S.get("voc2012", odd / "tree", local=[odd / "x.tar"], sources=sources)
    report, done = S.get("voc2012", odd / "tree", local=local, strict=False, progress=False, sources=sources)
    assert report.ok and done.written == 11 and len(voc2012(odd / "tree", "train_aug", strict=False)) == 9
    report, done = S.get("voc2012", odd / "tree", strict=False, progress=False, sources=sources)  # no address answers, none is asked
    assert report.ok and done is None
    with pytest.raises(ValueError, match="choose one of"): S.get("folder", odd)


def test_get_counts_are_strict_by_default(odd):
    sources = published(odd)
    with pytest.raises(ValueError, match="train_aug was not written: VOC train has 4 images"):
        S.get("voc2012", odd / "tree", local=[odd / sources[n].file for n in ("voc2012", "sbd")], progress=False, sources=sources)


def test_coco_mini_is_a_complete_folder_of_photographs(coco_mini):
    "Real photographs: its masks in COCO ids are good for 80 classes, and a copy of some in SBD form comes back unchanged"
    meta = json.loads((coco_mini / "meta.json").read_text())
    assert len(meta["categories"]) == 80
    for image in meta["images"][:12]:
        mask = coco_mini / f"SegmentationClassCOCO80/{image['id']}.png"
        assert S._is_good(mask, 80, S._image_size(coco_mini / f"JPEGImages/{image['id']}.jpg")) and S._image_size(mask) == tuple(image["size"][::-1])


def test_coco_mini_masks_as_sbd_files(coco_mini, odd):
    voc, sbd = odd / "voc", odd / "sbd"
    ids = (coco_mini / "ImageSets/Segmentation/val_voc20.txt").read_text().split()[:6]
    for d in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"): (voc / d).mkdir(parents=True)
    for i in ids:
        os.symlink(coco_mini / f"JPEGImages/{i}.jpg", voc / f"JPEGImages/{i}.jpg")
        mask = read_mask(coco_mini / f"SegmentationClass/{i}.png", 20)
        if i != ids[0]: write_sbd(sbd / f"cls/{i}.mat", np.where(mask == 255, np.uint8(0), mask))
        else: S._write_mask(voc / f"SegmentationClass/{i}.png", mask)
    for path, part in {voc / "ImageSets/Segmentation/train.txt": ids[:1], voc / "ImageSets/Segmentation/val.txt": ids[:1],
                       sbd / "train.txt": ids[1:4], sbd / "val.txt": ids[4:]}.items():
        path.write_text("\n".join(part) + "\n")
    assert S.sbd_to_masks(sbd, voc, progress=False) == S.Converted(6, 0, [])
    for i in ids:
        a, b = read_mask(coco_mini / f"SegmentationClass/{i}.png", 20), read_mask(voc / f"SegmentationClassAug/{i}.png", 20)
        assert np.array_equal(a % 255 if i != ids[0] else a, b)
