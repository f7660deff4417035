"""Real video files made hostile: pure functions of a seed, bytes in, bytes out.

`mutate` takes a file and cuts, zeroes, flips, splices or rearranges it, writes absurd numbers into its
headers, hides scripts in it or renames it; one to three of these at once. A seed means the same mutation
wherever the sources are the same.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Literal

PIECE_BYTES = 1 << 16
"""The most that is copied from elsewhere at once."""
HEADER_BYTES = 4096
"""Most headers lie within so much of a file's start."""


@dataclass(frozen=True)
class Source:
    """A whole video: its file name and what is in it."""

    name: str
    content: bytes = field(repr=False)


@dataclass(frozen=True)
class Bait:
    """What no decoder may touch: a file, by its whole path and by its name in the working folder."""

    path: str = "/tmp/raypipe-bait.mp4"
    name: str = "raypipe-bait.mp4"
    address: str = "127.0.0.1:9"
    """Where somebody listens who should never be called."""


@dataclass(frozen=True)
class Mutation:
    """A hostile file: the name to give it, what is in it, and what was done."""

    name: str
    content: bytes = field(repr=False)
    description: str


def mutate(seed: int, sources: Sequence[Source], bait: Bait | None = None) -> Mutation:
    """The mutation number `seed` of one of `sources`."""
    rng = Random(seed)
    source = rng.choice(sources)
    content, done = source.content, [source.name]
    for mutator in rng.choices(
        [m for m, _ in MUTATORS], [w for _, w in MUTATORS], k=rng.choice((1, 1, 2, 3))
    ):
        content, text = mutator(rng, content, sources)
        done.append(text)
    suffix = "." + source.name.rpartition(".")[2]
    if rng.random() < 0.15:  # last, since a bait's length may differ from one machine to another
        content, suffix, text = _add_bait(rng, content, suffix, bait or Bait())
        done.append(text)
    if rng.random() < 0.1:
        suffix = rng.choice(SUFFIXES)
        done.append(f"named {suffix or 'without a suffix'}")
    return Mutation(f"{seed:07}{suffix}", content, "; ".join(done))


SUFFIXES = (
    *("", ".mp4", ".mkv", ".avi", ".ts", ".flv", ".h264", ".hevc", ".gif", ".mpg", ".ivf", ".webm", ".rm"),
    *(".m3u8", ".ffconcat", ".mpd", ".sdp", ".idx", ".jpg", ".%03d.png", ".txt", ".mlv", ".asx", ".yuv"),
)


# --- the parts of a file ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """A box, element, chunk, object, page, tag or packet: [start, stop), its content from `body` on."""

    name: str
    start: int
    body: int
    stop: int
    size_at: int = 0
    """Where its length is written, in `size_bytes` bytes; none where it has none."""
    size_bytes: int = 0
    order: Literal["big", "little", "ebml"] = "big"


def parts(content: bytes) -> list[Part]:
    """The parts of a container in file order, nested ones after the one they are in; equal blocks else."""
    found: list[Part] = []
    if content[4:8] in MP4_TYPES:
        found = list(_boxes(content, 0, len(content)))
    elif content[:4] == b"\x1aE\xdf\xa3":
        found = list(_elements(content, 0, len(content)))
    elif content[:4] == b"RIFF":
        found = list(_chunks(content, 0, len(content), order="little"))
    elif content[:4] == b".RMF":
        found = list(_chunks(content, 0, len(content), order="big"))
    elif content[:4] == b"0&\xb2u":
        found = list(_asf_objects(content, 0, len(content)))
    elif content[:3] == b"FLV":
        found = list(_flv_tags(content))
    elif content[:4] == b"DKIF":
        found = list(_ivf_frames(content))
    elif content[:4] == b"OggS":
        found = list(_between(content, b"OggS", head=27))
    elif content[:1] == b"G" and content[188:189] == b"G":
        found = [
            Part(f"packet {number}", at, at + 4, at + 188)
            for number, at in enumerate(range(0, len(content) - 187, 188))
        ]
    elif content[:3] in (b"\0\0\1", b"\0\0\0"):
        found = list(_between(content, b"\0\0\1", head=4))
    if not found:
        size = max(1, len(content) // 32)
        found = [
            Part(f"block {at // size}", at, at, min(at + size, len(content)))
            for at in range(0, len(content), size)
        ]
    return found


MP4_TYPES = (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip", b"styp", b"moof")
MP4_HEADS = {  # boxes that hold boxes, and how many bytes stand before the first
    **dict.fromkeys((b"moov", b"trak", b"mdia", b"minf", b"stbl", b"moof", b"traf", b"edts", b"mvex"), 0),
    **dict.fromkeys((b"udta", b"dinf"), 0),
    **{b"meta": 4, b"stsd": 8, b"dref": 8},
    **dict.fromkeys((b"avc1", b"hvc1", b"hev1", b"mp4v", b"s263", b"vp09", b"av01"), 78),
}


def _boxes(content: bytes, start: int, stop: int) -> Iterator[Part]:
    """ISO/IEC 14496-12: a 32-bit length, a type; 1 announces a 64-bit length, 0 means to the end."""
    while start + 8 <= stop:
        size, kind = int.from_bytes(content[start : start + 4], "big"), content[start + 4 : start + 8]
        body = start + 8
        if size == 1:
            size, body = int.from_bytes(content[start + 8 : start + 16], "big"), start + 16
        end = stop if size == 0 else start + size
        if not body <= end <= stop:
            return
        yield Part(kind.decode("latin-1"), start, body, end, start, 4)
        if kind in MP4_HEADS:
            yield from _boxes(content, body + MP4_HEADS[kind], end)
        start = end


EBML_MASTERS = frozenset(
    (0x18538067, 0x1549A966, 0x1654AE6B, 0x1F43B675, 0xAE, 0xE0, 0xA0, 0x1C53BB6B, 0xBB, 0xB7, 0x114D9B74)
)


def _elements(content: bytes, start: int, stop: int) -> Iterator[Part]:
    """RFC 8794: an identifier and a length, each as long as its first byte says; all ones: not known."""
    while start + 2 <= stop:
        id_bytes = 9 - content[start].bit_length()
        size_at = start + id_bytes
        if id_bytes > 4 or size_at >= stop:
            return
        size_bytes = 9 - content[size_at].bit_length()
        if size_bytes > 8:
            return
        name, body = int.from_bytes(content[start:size_at], "big"), size_at + size_bytes
        size = int.from_bytes(content[size_at:body], "big") & (1 << 7 * size_bytes) - 1
        end = stop if size == (1 << 7 * size_bytes) - 1 else body + size
        if end > stop:
            return
        yield Part(f"{name:X}", start, body, end, size_at, size_bytes, "ebml")
        if name in EBML_MASTERS:
            yield from _elements(content, body, end)
        start = end


def _chunks(content: bytes, start: int, stop: int, *, order: Literal["big", "little"]) -> Iterator[Part]:
    """RIFF: a name, a length, content to an even end; RealMedia: the length counts the head as well."""
    while start + 8 <= stop:
        name, size = content[start : start + 4], int.from_bytes(content[start + 4 : start + 8], order)
        end = min(stop, start + 8 + size + size % 2 if order == "little" else start + max(8, size))
        yield Part(name.decode("latin-1"), start, start + 8, end, start + 4, 4, order)
        if name in (b"RIFF", b"LIST"):
            yield from _chunks(content, start + 12, end, order=order)
        start = end


ASF_HEADER = bytes.fromhex("3026b2758e66cf11a6d900aa0062ce6c")


def _asf_objects(content: bytes, start: int, stop: int) -> Iterator[Part]:
    """A GUID, a 64-bit length that counts both."""
    while start + 24 <= stop:
        name, size = content[start : start + 16], int.from_bytes(content[start + 16 : start + 24], "little")
        end = min(stop, start + max(24, size))
        yield Part(name[:4].hex(), start, start + 24, end, start + 16, 8, "little")
        if name == ASF_HEADER:
            yield from _asf_objects(content, start + 30, end)
        start = end


def _flv_tags(content: bytes) -> Iterator[Part]:
    start = 13
    while start + 11 <= len(content):
        end = start + 15 + int.from_bytes(content[start + 1 : start + 4], "big")
        yield Part(f"tag {content[start]}", start, start + 11, min(end, len(content)), start + 1, 3)
        start = end


def _ivf_frames(content: bytes) -> Iterator[Part]:
    start = 32
    while start + 12 <= len(content):
        end = start + 12 + int.from_bytes(content[start : start + 4], "little")
        yield Part("frame", start, start + 12, min(end, len(content)), start, 4, "little")
        start = end


def _between(content: bytes, mark: bytes, *, head: int) -> Iterator[Part]:
    """From each `mark` to the next."""
    start = content.find(mark)
    while start >= 0:
        after = content.find(mark, start + len(mark))
        stop = len(content) if after < 0 else after
        yield Part(mark.hex() + content[start + len(mark) :][:1].hex(), start, min(start + head, stop), stop)
        start = after


# --- what can be done to a file ---------------------------------------------------------------------

Mutator = Callable[[Random, bytes, Sequence[Source]], tuple[bytes, str]]


def cut(rng: Random, content: bytes, sources: Sequence[Source]) -> tuple[bytes, str]:
    """Leaves out an end, at random or where a part begins or ends."""
    if rng.random() < 0.5:
        part = rng.choice(parts(content) or [Part("nothing", 0, 0, 0)])
        at, where = rng.choice((part.start, part.body, part.stop)), f"at {part.name}"
    else:
        at, where = _position(rng, content), "anywhere"
    at = max(0, at + rng.choice((0, 0, 0, 1, -1)))
    if rng.random() < 0.2:
        return content[at:], f"without the first {at} bytes ({where})"
    return content[:at], f"cut to {at} of {len(content)} bytes ({where})"


def zero(rng: Random, content: bytes, sources: Sequence[Source]) -> tuple[bytes, str]:
    at, size = _range(rng, content)
    return _put(content, at, bytes(size)), f"{size} zeros at {at}"


def garbage(rng: Random, content: bytes, sources: Sequence[Source]) -> tuple[bytes, str]:
    at, size = _range(rng, content)
    return _put(content, at, rng.randbytes(size)), f"{size} random bytes at {at}"


def flip(rng: Random, content: bytes, sources: Sequence[Source]) -> tuple[bytes, str]:
    """Flips single bits or whole bytes, mostly few, sometimes one in a hundred."""
    if not content:
        return content, "nothing to flip"
    changed = bytearray(content)
    count = rng.choice((1, 1, 3, 10, 100, max(1, min(5000, len(content) // 100))))
    mask = rng.choice((0, 0xFF))
    places = [_position(rng, content) for _ in range(count)]
    for at in places:
        changed[min(at, len(content) - 1)] ^= mask or 1 << rng.randrange(8)
    return bytes(changed), f"{count} {'bytes' if mask else 'bits'} flipped, the first at {min(places)}"


def splice(rng: Random, content: bytes, sources: Sequence[Source]) -> tuple[bytes, str]:
    """Joins this file with another: head and tail, a piece within, or one after the other."""
    other = rng.choice(sources)
    at, there = _position(rng, content), _position(rng, other.content)
    if rng.random() < 0.5:
        at, there = _boundary(rng, content), _boundary(rng, other.content)
    piece = other.content[there : there + rng.choice((64, 1000, 20_000, PIECE_BYTES))]
    match rng.randrange(4):
        case 0:
            return content[:at] + other.content[there:], f"{at} bytes, then {other.name} from {there} on"
        case 1:
            inserted = content[:at] + piece + content[at:]
            return inserted, f"{len(piece)} bytes of {other.name} from {there} inserted at {at}"
        case 2:
            return _put(
                content, at, piece
            ), f"{len(piece)} bytes of {other.name} from {there} over those at {at}"
        case _:
            return content + other.content, f"followed by {other.name}"


def rearrange(rng: Random, content: bytes, sources: Sequence[Source]) -> tuple[bytes, str]:
    """Swaps, repeats, removes or blanks parts, or takes one from another file, of its kind if it can."""
    mine = parts(content)
    if len(mine) < 2:
        return content, "nothing to rearrange"
    one, two = sorted(rng.sample(mine, 2), key=lambda part: part.start)
    first, second = content[one.start : one.stop], content[two.start : two.stop]
    match rng.randrange(6):
        case 0 if one.stop <= two.start:
            between = content[one.stop : two.start]
            swapped = content[: one.start] + second + between + first + content[two.stop :]
            return swapped, f"{one.name} at {one.start} and {two.name} at {two.start} swapped"
        case 1:
            times = rng.choice((1, 1, 2, 50))
            repeated = second[:PIECE_BYTES] * times
            return (
                content[: two.stop] + repeated + content[two.stop :],
                f"{two.name} at {two.start} repeated {times} times",
            )
        case 2:
            return content[: two.start] + content[two.stop :], f"{two.name} at {two.start} removed"
        case 3 if two.order == "ebml" and two.body - two.start >= 2:
            size = two.stop - two.start - 9
            if size >= 0:
                void = b"\xec\x01" + size.to_bytes(7, "big") + bytes(size)
                return _put(content, two.start, void), f"{two.name} at {two.start} blanked"
            return _put(content, two.start, b"\xec"), f"{two.name} at {two.start} renamed to a blank"
        case 4:
            return _put(content, two.body, first[one.body - one.start :][: two.stop - two.body]), (
                f"{two.name} at {two.start} filled with {one.name} at {one.start}"
            )
        case _:
            other = rng.choice(sources)
            theirs = parts(other.content) or mine
            like = [part for part in theirs if part.name == two.name] or theirs
            taken = rng.choice(like)
            piece = other.content[taken.start : taken.stop][: 4 * PIECE_BYTES]
            if rng.random() < 0.5:
                piece = piece[: two.stop - two.start].ljust(two.stop - two.start, b"\0")  # all else stays put
            return content[: two.start] + piece + content[two.stop :], (
                f"{two.name} at {two.start} replaced by {taken.name} at {taken.start} of {other.name}"
            )


def missize(rng: Random, content: bytes, sources: Sequence[Source]) -> tuple[bytes, str]:
    """Lies about how long one to three parts are."""
    sized = [part for part in parts(content) if part.size_bytes]
    if not sized:
        return overwrite(rng, content, sources)
    said = []
    for part in rng.sample(sized, min(len(sized), rng.choice((1, 1, 2, 3)))):
        value = _extreme(rng, part.size_bytes, part.order)
        content = _put(content, part.size_at, value)
        said.append(f"size of {part.name} at {part.start} is {value.hex()}")
    return content, ", ".join(said)


def overwrite(rng: Random, content: bytes, sources: Sequence[Source]) -> tuple[bytes, str]:
    """Writes absurd numbers over words of the headers, or of the first words in small parts.

    There lie frame sizes, time scales, counts, offsets, durations and codec settings.
    """
    if not content:
        return content, "nothing to overwrite"
    small = [part for part in parts(content) if 0 < part.stop - part.body <= HEADER_BYTES]
    said = []
    for _ in range(rng.choice((1, 1, 2, 4, 8))):
        width = rng.choice((1, 2, 2, 4, 4, 4, 8))
        if small and rng.random() < 0.7:
            part = rng.choice(small)
            at = part.body + rng.randrange(min(part.stop - part.body, 96))
        else:
            at = rng.randrange(min(len(content), HEADER_BYTES))
        if rng.random() < 0.7:
            at -= at % 2
        value = _extreme(rng, width, rng.choice(("big", "little")))
        content = _put(content, at, value)
        said.append(f"{value.hex()} at {at}")
    return content, ", ".join(said)


def shrink(rng: Random, content: bytes, sources: Sequence[Source]) -> tuple[bytes, str]:
    """Leaves nothing, or next to nothing."""
    size = rng.choice((0, 0, 1, 3, 4, 8, 12, 16, 64))
    return content[:size], f"only {size} bytes"


MUTATORS: Sequence[tuple[Mutator, int]] = (
    (cut, 12),
    (zero, 12),
    (garbage, 12),
    (flip, 16),
    (splice, 12),
    (rearrange, 14),
    (missize, 10),
    (overwrite, 22),
    (shrink, 1),
)
"""With how often each is taken."""


def _position(rng: Random, content: bytes) -> int:
    """Anywhere, but every third time within the headers."""
    end = len(content) if rng.random() < 0.67 else min(len(content), HEADER_BYTES)
    return rng.randrange(end + 1)


def _boundary(rng: Random, content: bytes) -> int:
    found = parts(content)
    return rng.choice(found).start if found else 0


def _range(rng: Random, content: bytes) -> tuple[int, int]:
    at = _position(rng, content)
    return at, min(rng.choice((1, 4, 16, 188, 400, 4096, 50_000)), len(content) - at)


def _put(content: bytes, at: int, piece: bytes) -> bytes:
    """The content with the piece written over it, as long as before."""
    return (content[:at] + piece + content[at + len(piece) :])[: len(content)]


def _extreme(rng: Random, width: int, order: Literal["big", "little", "ebml"]) -> bytes:
    """A number of `width` bytes that few programs expect."""
    top = 1 << 8 * width
    values = [0, 1, 2, 7, top - 1, top - 2, top // 2, top // 2 - 1, top // 16, 1 << rng.randrange(8 * width)]
    value = rng.choice([*values, rng.randrange(top), rng.randrange(min(top, 1 << 16))])
    if order == "ebml":  # the first byte also says how many there are
        marker = 1 << 7 * width
        return (value % marker | marker).to_bytes(width, "big")
    return value.to_bytes(width, order)


# --- scripts that name other files ------------------------------------------------------------------

SCRIPTS: Sequence[tuple[str, str, str]] = (
    (
        "ffconcat",
        ".ffconcat",
        "ffconcat version 1.0\nfile '{path}'\nfile {name}\nfile http://{address}/a.mp4\n",
    ),
    (
        "HLS",
        ".m3u8",
        "#EXTM3U\n#EXT-X-TARGETDURATION:4\n#EXTINF:4,\n{name}\n#EXTINF:4,\n{path}\n#EXT-X-ENDLIST\n",
    ),
    (
        "HLS of an address",
        ".m3u8",
        '#EXTM3U\n#EXT-X-TARGETDURATION:4\n#EXT-X-MAP:URI="http://{address}/i"\n'
        '#EXT-X-KEY:METHOD=AES-128,URI="http://{address}/k"\n#EXTINF:4,\nhttp://{address}/o.ts\n',
    ),
    (
        "DASH",
        ".mpd",
        '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static"><BaseURL>'
        'http://{address}/</BaseURL><Period><AdaptationSet mimeType="video/mp4"><Representation id="1" '
        'bandwidth="1"><BaseURL>{path}</BaseURL></Representation></AdaptationSet></Period></MPD>',
    ),
    (
        "SDP",
        ".sdp",
        "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\n"
        "a=control:rtsp://{address}/a\n",
    ),
    ("RTSP", ".rtsp", "RTSPtextRTSP://{address}/a\n"),
    ("ASX", ".asx", '<ASX version="3.0"><ENTRY><REF HREF="http://{address}/a.asf"/></ENTRY></ASX>\n'),
    ("references", ".asf", "[Reference]\nRef1=http://{address}/a.asf\nRef2={path}\n"),
    ("SMIL", ".smil", '<smil><body><video src="{path}"/><video src="http://{address}/a"/></body></smil>\n'),
    ("addresses", ".ram", "http://{address}/a.rm\n{path}\nfile:{path}\n"),
    (
        "VobSub",
        ".idx",
        "# VobSub index file, v7 (do not modify this line!)\nid: en, index: 0\ntimestamp: 0\n",
    ),
    ("XML", ".xml", '<?xml version="1.0"?><!DOCTYPE a [<!ENTITY b SYSTEM "file://{path}">]><a>&b;</a>'),
    ("settings", ".ffmetadata", ";FFMETADATA1\ntitle={path}\n[STREAM]\nurl=http://{address}/a\n"),
)


def _add_bait(rng: Random, content: bytes, suffix: str, bait: Bait) -> tuple[bytes, str, str]:
    """The content with a script before, behind or inside it, or in its place; and a suffix that fits."""
    name, script_suffix, text = rng.choice(SCRIPTS)
    script = text.format(path=bait.path, name=bait.name, address=bait.address).encode()
    where = rng.choice(("before", "behind", "inside", "as metadata", "alone"))
    part = rng.choice(parts(content) or [Part("nothing", 0, 0, 0)])
    if rng.random() < 0.5:
        suffix = script_suffix
    match where:
        case "before":
            content = script + content
        case "behind":
            content = content + script
        case "inside":
            content = _put(content, part.body, script)
        case "as metadata":
            content = _with_metadata(content, script)
        case _:
            content = script
    return content, suffix, f"{name} {where}, named {suffix}"


def _with_metadata(content: bytes, text: bytes) -> bytes:
    """The content with a text in a place for descriptions, where its container has one."""
    size = len(text)
    if content[4:8] in MP4_TYPES:
        name = (size + 16).to_bytes(4, "big") + b"data" + (1).to_bytes(4, "big") + bytes(4) + text
        title = (len(name) + 8).to_bytes(4, "big") + b"\xa9nam" + name
        url = (size + 12).to_bytes(4, "big") + b"url " + bytes(4) + text
        return content + (len(title + url) + 8).to_bytes(4, "big") + b"udta" + title + url
    if content[:4] == b"\x1aE\xdf\xa3":  # a segment's title, in an Info of its own
        title = b"\x7b\xa9\x08" + size.to_bytes(4, "big") + text
        return content + b"\x15\x49\xa9\x66\x08" + len(title).to_bytes(4, "big") + title
    if content[:4] == b"RIFF":
        return content + b"INAM" + size.to_bytes(4, "little") + text
    return b"ID3\4\0\0\0\0" + bytes([(size >> 7) & 0x7F, size & 0x7F]) + text + content


# --- damage within a stream, to see what a decoder tells of it --------------------------------------

Damage = Literal["zeros", "garbage", "flips", "cut"]
DAMAGED_BYTES = 400


def damage(seed: int, content: bytes, kind: Damage, *, head: int, tail: int) -> bytes:
    """The content damaged at one to three places, but not in its first `head` and last `tail` bytes."""
    rng = Random(seed)
    places = [rng.randrange(head, len(content) - tail - DAMAGED_BYTES) for _ in range(rng.choice((1, 1, 3)))]
    if kind == "cut":
        return content[: places[0]]
    for at in places:
        match kind:
            case "zeros":
                piece = bytes(DAMAGED_BYTES)
            case "garbage":
                piece = rng.randbytes(DAMAGED_BYTES)
            case "flips":
                piece = bytes([content[at] ^ 1 << rng.randrange(8)])
        content = _put(content, at, piece)
    return content
