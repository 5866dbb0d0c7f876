"""The manifest as an untrusted file, the check that blocks tile a tensor, and byte ranges as boxes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import xxhash
from checkpoint_cases import one_tensor, random_box, random_tiling, save_ranks

from hpctrain.checkpoint import format as fmt
from hpctrain.checkpoint import open_checkpoint
from hpctrain.errors import CheckpointError
from hpctrain.partition import volume

FOLDER = Path("run/checkpoints/step-000000000007")


def test_pieces_of_a_range_are_its_elements_in_order(seed: int) -> None:
    rng = np.random.default_rng(seed)
    for _ in range(300):
        shape = tuple(rng.integers(1, 6, rng.integers(0, 5)).tolist())
        numbers = np.arange(volume(tuple(slice(0, n) for n in shape))).reshape(shape)
        start, stop = sorted(rng.integers(0, numbers.size + 1, 2).tolist())
        found = list(fmt.pieces(shape, start, stop))
        elements = [n for piece in found for n in numbers[piece].ravel().tolist()]
        assert elements == list(range(start, stop)), (shape, start, stop)
        assert len(found) <= max(1, 2 * len(shape) - 1)


def tiles(name: str, shape: tuple[int, ...], boxes: list) -> bool:
    try:
        fmt.check_tiling(name, shape, boxes, [f"rank-{i:05d}.bin" for i in range(len(boxes))])
    except CheckpointError:
        return False
    return True


def test_tilings_are_accepted_and_anything_else_is_not(seed: int) -> None:
    rng = np.random.default_rng(seed)
    verdicts = []
    for _ in range(600):
        shape = tuple(rng.integers(1, 6, rng.integers(0, 4)).tolist())
        boxes = random_tiling(rng, shape, int(rng.integers(8)))
        match rng.integers(4):  # 0: leave it whole
            case 1:
                boxes.pop(rng.integers(len(boxes)))
            case 2:
                boxes.append(random_box(rng, shape))
            case 3:  # move one box: the volume stays right
                boxes[rng.integers(len(boxes))] = boxes[rng.integers(len(boxes))]
        boxes = [box for box in boxes if volume(box)]
        counts = np.zeros(shape, int)
        for box in boxes:
            counts[box] += 1
        verdicts.append(bool((counts == 1).all()))
        assert tiles("w", shape, boxes) == verdicts[-1], (shape, boxes)
    assert 100 < sum(verdicts) < 500


def manifest_fields() -> dict:
    """A small manifest with two files, a cut tensor and a 0-d one."""
    block = {"offset": 0, "start": [0, 0], "extent": [2, 5], "xxh3_128": ["0" * 32], "file": 0}
    other = {"offset": 0, "start": [2, 0], "extent": [1, 5], "xxh3_128": ["1" * 32], "file": 1}
    scalar = {"offset": 4096, "start": [], "extent": [], "xxh3_128": ["2" * 32], "file": 1}
    return {
        "format": "hpctrain-checkpoint",
        "version": 1,
        "step": 7,
        "hash_block": 1 << 24,
        "files": [{"name": "rank-00000.bin", "bytes": 4096}, {"name": "rank-00003.bin", "bytes": 8192}],
        "tensors": {
            "w": {"shape": [3, 5], "dtype": "float32", "blocks": [block, other]},
            "scale": {"shape": [], "dtype": "int64", "blocks": [scalar]},
        },
        "state": {"epoch": 3, "loss": 0.1, "seed": 2**100, "plan": {"conv1": {"batch": 2}}},
    }


def sealed(fields: dict) -> bytes:
    """MANIFEST.json as the format says: canonical JSON, with the xxh3-128 of the same without that field."""
    digest = xxhash.xxh3_128(json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
    return json.dumps({**fields, "xxh3_128": digest}, sort_keys=True, separators=(",", ":")).encode() + b"\n"


def test_manifest_round_trip() -> None:
    raw = sealed(manifest_fields())
    manifest = fmt.decode(FOLDER, raw)
    assert fmt.encode(manifest) == raw
    assert manifest.state == manifest_fields()["state"]
    assert manifest.tensors["w"].blocks[1].box == (slice(2, 3), slice(0, 5))


def test_every_flipped_bit_and_every_truncation_of_a_manifest_is_seen() -> None:
    raw = sealed(manifest_fields())
    for bit in range(8 * len(raw)):
        damaged = bytearray(raw)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(CheckpointError, match=r"step-000000000007: MANIFEST.json .*(differs|damaged)"):
            fmt.decode(FOLDER, bytes(damaged))
    for length in range(len(raw)):
        with pytest.raises(CheckpointError, match=r"MANIFEST.json"):
            fmt.decode(FOLDER, raw[:length])


def test_same_json_in_another_form_is_refused() -> None:
    raw = sealed(manifest_fields())
    for other in (raw + b" ", raw.replace(b'"step":7', b'"step":6,"step":7'), json.dumps(json.loads(raw)).encode()):
        assert json.loads(other) == json.loads(raw)
        with pytest.raises(CheckpointError, match="hash differs"):
            fmt.decode(FOLDER, other)


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"[]",
        b"null",
        b"{}",
        b'{"xxh3_128":1}',
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b"NaN",
        b"1" * 5000,
    ],
    ids=lambda raw: raw[:12].decode("latin1"),
)
def test_what_is_not_a_manifest_is_refused(raw: bytes) -> None:
    with pytest.raises(CheckpointError, match=r"MANIFEST.json .*restore"):
        fmt.decode(FOLDER, raw)


HOSTILE = {
    "traversal": (("files", 0, "name"), "../rank-00000.bin", "file name '../rank-00000.bin'"),
    "absolute": (("files", 0, "name"), "/etc/passwd", "file name '/etc/passwd'"),
    "in a folder": (("files", 0, "name"), "a/rank-00000.bin", "file name"),
    "other spelling": (("files", 0, "name"), "rank-000000.bin", "file name"),
    "newline": (("files", 0, "name"), "rank-00000.bin\n", "file name"),
    "twice": (("files", 1, "name"), "rank-00000.bin", "order of ranks"),
    "file too large": (("files", 0, "bytes"), 4097, "rank-00000.bin: 4097 bytes stated, but its blocks fill 4096"),
    "huge file": (("files", 0, "bytes"), 2**63, r"files\[0\].bytes"),
    "float size": (("files", 0, "bytes"), 4096.0, "Expected `int`"),
    "negative": (("tensors", "w", "blocks", 0, "offset"), -4096, "offset"),
    "unaligned": (("tensors", "w", "blocks", 0, "offset"), 8, "rank-00000.bin: a block at byte 8"),
    "beyond the file": (("tensors", "w", "blocks", 0, "offset"), 1 << 40, "rank-00000.bin: a block at byte"),
    "two in one place": (("tensors", "scale", "blocks", 0, "offset"), 0, "rank-00003.bin: a block at byte 0"),
    "no such file": (("tensors", "w", "blocks", 0, "file"), 2, "tensor 'w', block at .*file number 2 of 2"),
    "overlap": (
        ("tensors", "w", "blocks", 1, "start"),
        [1, 0],
        "'w': boxes of rank-00000.bin and rank-00003.bin overlap",
    ),
    "gap": (("tensors", "w", "shape"), [4, 5], "'w': blocks hold 15 of the 20 elements"),
    "outside": (("tensors", "w", "blocks", 1, "start"), [3, 0], "'w', block at .*outside"),
    "empty block": (("tensors", "w", "blocks", 1, "extent"), [0, 5], "'w', block at .*empty"),
    "too few dims": (("tensors", "w", "blocks", 1, "extent"), [5], "'w', block at .*shape"),
    "40 dims": (("tensors", "w", "shape"), [1] * 40, "length"),
    "4 EiB": (("tensors", "w", "shape"), [1 << 40, 1 << 20], "'w': shape .*bytes"),
    "pickled": (("tensors", "w", "dtype"), "object", "'w': dtype 'object'"),
    "no dtype": (("tensors", "w", "dtype"), "float31", "'w': dtype 'float31'"),
    "hash missing": (("tensors", "w", "blocks", 0, "xxh3_128"), [], "'w', block at .*0 hashes, but 1"),
    "hash of a number": (("tensors", "w", "blocks", 0, "xxh3_128"), [7], "Expected `str`"),
    "odd hash block": (("hash_block",), 100, "hash_block"),
    "large hash block": (("hash_block",), 1 << 30, "hash_block"),
    "unknown key": (("extra",), 1, "extra"),
    "state": (("state",), [1], "Expected `object`"),
    "other program": (("format",), "hdf5", "format"),
    "newer": (("version",), 2, "version 2, this program reads 1"),
    "step": (("step",), 10**12, "step"),
}


@pytest.mark.parametrize(("path", "value", "message"), HOSTILE.values(), ids=HOSTILE)
def test_hostile_manifests_are_refused(path: tuple, value: object, message: str) -> None:
    fields = manifest_fields()
    at = fields
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    with pytest.raises(CheckpointError, match=message) as caught:
        fmt.decode(FOLDER, sealed(fields))
    assert str(caught.value).startswith(f"{FOLDER}: MANIFEST.json")


@pytest.mark.parametrize("name", ["", "a\nb", "\x1b[2J", "\ud800", "x" * 501])
def test_tensor_names_that_cannot_be_shown_are_refused(name: str) -> None:
    fields = manifest_fields()
    fields["tensors"][name] = fields["tensors"].pop("scale")
    with pytest.raises(CheckpointError, match="tensor name"):
        fmt.decode(FOLDER, sealed(fields))


def test_missing_and_oversized_manifests_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CheckpointError, match=r"step-000000000001: MANIFEST.json cannot be read: No such file"):
        open_checkpoint(tmp_path / "step-000000000001")
    path = save_ranks(tmp_path, 1, one_tensor(1))
    monkeypatch.setattr(fmt, "MAX_MANIFEST", 100)
    with pytest.raises(CheckpointError, match="more than 100"):
        open_checkpoint(path)
