"""`launch.checkpoint`: lists, checks, copies and compares checkpoints, and trusts none of them."""

import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from launch import checkpoint as command
from models.build import build_model
from models.config import ModelConfig
from models.initialize import global_parameters
from models.moe_config import MoEConfig
from parallel import safe_pickle
from parallel.checkpoint_manifest import MISSING, verify, write_manifest
from parallel.checkpoint_reader import CheckpointFormatError, CheckpointReader, StoredWeights
from parallel.config import OptimizerConfig, ParallelConfig
from parallel.engine import MegatronEngine
from parallel.runtime import initialize, shutdown
from parallel.safe_pickle import UnsafePickleError
from pretrain import safetensors_file
from pretrain.checkpoint import Checkpoints
from pretrain.checkpoint_list import (
    DamagedCheckpointError,
    find_checkpoint,
    find_checkpoints,
)
from pretrain.compare_checkpoints import compare
from pretrain.config import CheckpointConfig
from pretrain.convert_checkpoint import to_checkpoint
from pretrain.export import open_source
from pretrain.run_identity import model_identity
from pretrain.safetensors_file import Entry, write_sharded
from pretrain.train_state import TrainState
from tests.distributed import RankFailed, run_on_gloo
from tests.stored_runs import VOCAB, live_logits, write_run, write_trained_run

ROOT = Path(__file__).resolve().parents[2]
MODEL = ModelConfig(
    name="stored",
    num_layers=2,
    hidden_size=32,
    ffn_hidden_size=48,
    num_attention_heads=4,
    max_position_embeddings=32,
    make_vocab_size_divisible_by=32,
    vocab_size=VOCAB,
)
SPARSE = replace(MODEL, moe=MoEConfig(num_experts=4, router_topk=2))
TP2 = ParallelConfig(tensor_model_parallel_size=2)
IDS = [[5, 7, 11, 13, 17, 19, 23, 29]]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two checkpoints with optimizers, of two ranks."""
    folder = tmp_path_factory.mktemp("stored") / "run"
    for step in (2, 10):
        run_on_gloo(2, write_trained_run, folder, MODEL, TP2, step)
    metrics = [
        {"step": 2, "train/loss": 4.5},
        {"step": 10, "eval/loss": 3.25},
        {"step": 10, "train/loss": 3.5},
    ]
    text = "\n".join(map(json.dumps, metrics)) + '\n{"step": 11, "train/lo'
    (folder / "metrics.jsonl").write_text(text)
    return folder


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    """The run again, to be damaged."""
    shutil.copytree(run, tmp_path / "copy")
    return tmp_path / "copy"


def call(*words: Any) -> int:
    return command.run(command.parse([str(word) for word in words]))


# ---------------------------------------------------------------- ls and verify


def test_ls_and_verify_do_without_torch(run: Path) -> None:
    """A process that lists and verifies, and says what it has imported and how long it took."""
    code = (
        "import sys, time\n"
        "from launch.checkpoint import parse, run\n"
        "assert run(parse(['ls', sys.argv[1]])) == 0\n"
        "assert run(parse(['verify', sys.argv[1], '--full'])) == 0\n"
        "print([m for m in ('torch', 'megatron', 'numpy', 'omegaconf') if m in sys.modules])\n"
        "print(time.process_time())\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code, str(run)], cwd=ROOT, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr
    *lines, imported, seconds = ended.stdout.splitlines()
    assert lines[0].endswith("2 layers of 32, sub_ln, xpos, vocabulary 120")
    assert [line.split()[0] for line in lines[1:4]] == ["step", "2", "10"]
    assert "64" in lines[2].split() and "4.5000 train" in lines[2]
    assert "320" in lines[3].split() and "3.2500 eval" in lines[3]
    assert lines[3].endswith("sound") and lines[4] == "step_00000010: sound (checksums)"
    assert imported == "[]" and float(seconds) < 1


def test_ls_shows_what_is_damaged(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = copy / "checkpoints"
    (folder / "step_00000002/__0_0.distcp").unlink()
    shutil.copytree(folder / "step_00000010", folder / "step_00000011.damaged")
    (folder / "step_00000012.partial").mkdir()
    (folder / "step_00000013").mkdir()
    (folder / "step_00000010/manifest.json").unlink()
    assert call("ls", copy) == 0
    said = capsys.readouterr().out
    assert "damaged: __0_0.distcp is missing" in said
    assert f"damaged: {MISSING}" in said
    assert "step_00000011.damaged" in said and "damaged, set aside by a run" in said
    assert "step_00000012.partial" in said and "unfinished save" in said
    assert "damaged: metadata.json is missing" in said


def test_checkpoints_from_before_manifests_are_compared_with_their_index(
    copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copy / "checkpoints/step_00000010"
    plain = torch.load(folder / "common.pt", weights_only=True)
    del plain["format"]
    torch.save(plain, folder / "common.pt")
    (folder / "manifest.json").unlink()
    assert call("verify", folder) == 0
    assert "its index fits its files; not verifiable" in capsys.readouterr().out
    with open(folder / "__1_0.distcp", "r+b") as file:
        file.truncate(1000)
    assert call("verify", folder) == 1
    assert "__1_0.distcp has 1000 bytes; " in capsys.readouterr().out


def test_verify_finds_a_flipped_bit_only_in_full(
    copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = copy / "checkpoints/step_00000002/__0_0.distcp"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert call("verify", copy, "--step", 2) == 0
    assert call("verify", copy, "--step", 2, "--full") == 1
    assert "__0_0.distcp has checksum" in capsys.readouterr().out


def test_damage_of_every_file_is_found(copy: Path) -> None:
    """Cut off or deleted, whether there is a manifest for it or not."""
    for step, rewrite in ((2, False), (10, True)):
        folder = copy / f"checkpoints/step_{step:08d}"
        for path in sorted(folder.iterdir()):
            content = path.read_bytes()
            path.write_bytes(content[: len(content) // 2])
            if rewrite and path.name != "manifest.json":
                write_manifest(folder)
            assert call("verify", folder) == 1 or path.name == "manifest.json", path.name
            path.write_bytes(content)
            write_manifest(folder)
        assert call("verify", folder, "--full") == 0


def test_what_is_no_checkpoint_is_said(copy: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such folder"):
        call("ls", tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match="holds no complete checkpoint; it holds runs: "):
        call("verify", tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="complete checkpoint; name a run folder, its chec"):
        call("verify", tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match="is one checkpoint, whose step is not asked for"):
        find_checkpoint(find_checkpoints(copy)[0], 3)
    with pytest.raises(FileNotFoundError, match="no checkpoint of step 3; there are 2, 10"):
        find_checkpoint(copy, 3)
    assert find_checkpoints(copy / "checkpoints") == find_checkpoints(copy)
    with pytest.raises(CheckpointFormatError, match=r"not a checkpoint: it has no metadata\.json"):
        CheckpointReader(tmp_path)
    folder = find_checkpoint(copy)
    (folder / "metadata.json").write_text('{"sharded_backend": "zarr"}')
    with pytest.raises(CheckpointFormatError, match="format zarr"):
        CheckpointReader(folder)
    (folder / "metadata.json").write_text("[]")
    with pytest.raises(CheckpointFormatError, match=r"metadata\.json is damaged"):
        CheckpointReader(folder)
    ended = subprocess.run(
        [sys.executable, "launch/checkpoint.py", "ls", str(tmp_path / "nothing")],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 2
    assert ended.stderr == f"error: {tmp_path / 'nothing'}: no such folder\n"


# ---------------------------------------------------------------- pickles of strangers


class Malicious:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


def plant(folder: Path, file: str, trap: Path) -> None:
    """Put into `file` of a checkpoint a pickle that makes `trap` when it is loaded."""
    evil = Malicious(trap)
    if file == ".metadata":
        (folder / file).write_bytes(pickle.dumps(evil))
    elif file == "common.pt":
        torch.save({"train_state": evil}, folder / file)
    elif file in ("object", "tensor"):
        inside = io.BytesIO()
        torch.save(evil, inside)
        exchange(folder, file, inside.getvalue())
    else:
        index = CheckpointReader(folder)
        piece = next(iter(index.weights.values())).pieces[0]
        torch.save(evil, folder / "evil")
        content = bytearray((folder / piece.file).read_bytes())
        inside = (folder / "evil").read_bytes()
        content[piece.start : piece.start + piece.length] = inside.ljust(piece.length, b"\0")
        (folder / piece.file).write_bytes(content[: piece.start] + inside)
        (folder / "evil").unlink()


def exchange(folder: Path, kind: str, content: bytes) -> None:
    """Have the index of a checkpoint find `content` where its first "object" or "tensor" is."""
    index = pickle.loads((folder / ".metadata").read_bytes())
    places, is_object = index.storage_data, kind == "object"
    place = places[next(key for key in places if ("_extra_state" in key.fqn) == is_object)]
    with open(folder / place.relative_path, "ab") as end:
        place.offset, place.length = end.tell(), end.write(content)
    (folder / ".metadata").write_bytes(pickle.dumps(index))


@pytest.mark.parametrize("file", [".metadata", "common.pt", "__0_0.distcp", "object"])
def test_nothing_that_a_file_names_is_executed(copy: Path, tmp_path: Path, file: str) -> None:
    folder, trap = find_checkpoint(copy), tmp_path / "trap"
    plant(folder, file, trap)
    write_manifest(folder)
    call("ls", copy)
    assert call("verify", folder, "--full") == 1
    errors = (UnsafePickleError, CheckpointFormatError)
    with pytest.raises(errors):
        call("convert", folder, tmp_path / "out")
    if file != "object":  # which are not compared
        with pytest.raises(errors):
            call("diff", folder, copy / "checkpoints/step_00000002")
    assert not trap.exists() and not (tmp_path / "out").exists()
    pickle.loads(pickle.dumps(Malicious(trap)))  # the trap is one
    assert trap.exists()


def test_nobody_is_told_how_to_run_a_tensor(copy: Path, tmp_path: Path) -> None:
    """torch.load's own error goes on with how to load such a file all the same."""
    folder, trap = find_checkpoint(copy), tmp_path / "trap"
    in_a_zip, raw, of_protocol_4 = io.BytesIO(), pickle.dumps(Malicious(trap)), io.BytesIO()
    torch.save(Malicious(trap), in_a_zip)
    torch.save({"a": 1}, of_protocol_4, pickle_protocol=4)
    for content, said in (
        (in_a_zip.getvalue(), "it names posix.system, which weights do not need; nothing of it"),
        (raw, "what is pickled in it are not weights alone; nothing of it was executed"),
    ):
        exchange(folder, "tensor", content)
        write_manifest(folder)
        for words in (["convert", folder, tmp_path / "out"], ["diff", folder, folder]):
            with pytest.raises(CheckpointFormatError, match=r"damaged where .* lies: ") as refused:
                call(*words)
            assert said in str(refused.value) and "weights_only" not in str(refused.value)
    exchange(folder, "object", of_protocol_4.getvalue())  # which torch does not read
    with pytest.raises(CheckpointFormatError, match=r"_extra_state.* lies: .* not weights alone"):
        CheckpointReader(folder).check_harmless()
    assert not trap.exists()


@pytest.mark.parametrize("file", [".metadata", "object"])
def test_a_model_is_not_loaded_from_them(copy: Path, tmp_path: Path, file: str) -> None:
    folder, trap = find_checkpoint(copy), tmp_path / "trap"
    plant(folder, file, trap)
    write_manifest(folder)  # whoever can write the one can write the other
    with pytest.raises(RankFailed, match=r"could not read .* names posix\.system"):
        run_on_gloo(1, live_logits, folder, MODEL, IDS)
    with pytest.raises(UnsafePickleError, match=r"names posix\.system"):
        open_source(folder)
    assert not trap.exists()


def test_an_index_says_one_thing_only(copy: Path) -> None:
    """What torch takes for an object is read as one, and what it could find twice is refused."""
    folder = find_checkpoint(copy)
    index = pickle.loads((folder / ".metadata").read_bytes())
    entries, places = index.state_dict_metadata, index.storage_data
    key = next(key for key in places if "_extra_state" in key.fqn)
    entries[key.fqn].properties, entries[key.fqn].size = None, ()
    (folder / ".metadata").write_bytes(pickle.dumps(index))
    assert key.fqn in CheckpointReader(folder).objects
    other = next(k for k in places if "_extra_state" in k.fqn and k != key)
    object.__setattr__(other, "fqn", key.fqn)
    (folder / ".metadata").write_bytes(pickle.dumps(index))
    with pytest.raises(CheckpointFormatError, match=f"has a piece of {key.fqn} twice"):
        CheckpointReader(folder).problems()


def test_a_damaged_object_is_named(copy: Path) -> None:
    folder = find_checkpoint(copy)
    name, piece = next(iter(CheckpointReader(folder).objects.items()))
    content = bytearray((folder / piece.file).read_bytes())
    content[piece.start : piece.start + piece.length] = bytes(piece.length)
    (folder / piece.file).write_bytes(content)
    (problem,) = CheckpointReader(folder).problems()
    assert f"{name}, is damaged: " in problem


def test_torch_reads_nothing_else_in_a_file_than_we_do(tmp_path: Path) -> None:
    trap, path = tmp_path / "trap", tmp_path / "values.pt"
    torch.save([1], path)
    honest = path.read_bytes()
    assert safe_pickle.load_saved(path) == [1]
    before = pickle.dumps(Malicious(trap))  # torch.load would take that
    for bytes_before in (before, b"PK\x03\x04" + before):
        path.write_bytes(bytes_before + honest)
        with pytest.raises(ValueError, match=r"no file of torch\.save's"):
            safe_pickle.load_saved(path)
    for name in ("archive/DATA.PKL", "archive/constants.pkl"):
        path.write_bytes(honest)
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr(name, before)
        with pytest.raises(ValueError, match=r"no file of torch\.save's"):
            safe_pickle.load_saved(path)
    assert not trap.exists()


def test_a_stranger_is_named_or_stands_for_itself(tmp_path: Path) -> None:
    trap, path = tmp_path / "trap", tmp_path / "values.pt"
    torch.save({"args": Malicious(trap), "tensor": torch.ones(2)}, path)
    with pytest.raises(UnsafePickleError, match=r"names posix\.system, .* nothing of it was exec"):
        safe_pickle.load_saved(path)
    values = safe_pickle.load_saved(path, tolerant=True)
    assert repr(values["args"]) == "<posix.system>" and not trap.exists()
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("nothing", b"")
    with pytest.raises(ValueError, match=r"no file of torch\.save's"):
        safe_pickle.load_saved(path)


def test_no_file_outside_of_the_folder_is_read(copy: Path) -> None:
    folder = find_checkpoint(copy)
    index = pickle.loads((folder / ".metadata").read_bytes())
    for place in index.storage_data.values():
        place.relative_path = f"../step_00000002/{place.relative_path}"
    (folder / ".metadata").write_bytes(pickle.dumps(index))
    reader = CheckpointReader(folder)
    with pytest.raises(CheckpointFormatError, match="is missing"):
        reader.read(next(iter(reader.tensors)))


def test_damaged_pieces_are_named(copy: Path) -> None:
    folder = find_checkpoint(copy)
    index = pickle.loads((folder / ".metadata").read_bytes())
    name = "decoder.final_layernorm.weight"
    piece = CheckpointReader(folder).tensors[name].pieces[0]
    content = bytearray((folder / piece.file).read_bytes())
    content[piece.start : piece.start + piece.length] = bytes(piece.length)
    (folder / piece.file).write_bytes(content)
    with pytest.raises(CheckpointFormatError, match=f"is damaged where {name} lies"):
        CheckpointReader(folder).read(name)
    index.state_dict_metadata[name].chunks.clear()
    (folder / ".metadata").write_bytes(pickle.dumps(index))
    assert CheckpointReader(folder).problems() == [f"{name}: 0 of 32 elements are there"]
    with pytest.raises(CheckpointFormatError, match=f"parts of {name} are missing"):
        CheckpointReader(folder).read(name)
    for place in index.storage_data.values():
        place.transform_descriptors = ["zstd"]
    (folder / ".metadata").write_bytes(pickle.dumps(index))
    with pytest.raises(CheckpointFormatError, match="its tensors are compressed"):
        _ = CheckpointReader(folder).tensors
    index.storage_data.clear()
    (folder / ".metadata").write_bytes(pickle.dumps(index))
    with pytest.raises(CheckpointFormatError, match="misses a piece"):
        _ = CheckpointReader(folder).tensors
    (folder / ".metadata").write_bytes(pickle.dumps([1]))
    with pytest.raises(CheckpointFormatError, match="it is no index"):
        _ = CheckpointReader(folder).tensors
    (folder / "common.pt").write_bytes(b"")
    with pytest.raises(CheckpointFormatError, match=r"common\.pt is damaged"):
        _ = CheckpointReader(folder).plain
    torch.save([1], folder / "common.pt")
    with pytest.raises(CheckpointFormatError, match="holds no table of values"):
        _ = CheckpointReader(folder).plain


def test_blocks_of_tensors_are_cut_out_of_any_pieces(run: Path) -> None:
    reader = CheckpointReader(find_checkpoint(run))
    weights = StoredWeights(reader)
    stacked = reader.read("decoder.layers.mlp.linear_fc1.weight")
    assert len(reader.tensors["decoder.layers.mlp.linear_fc1.weight"].pieces) == 4
    assert torch.equal(weights.read("decoder.layers.1.mlp.linear_fc1.weight"), stacked[1])
    box = ((0, 20, 3), (2, 9, 5))  # over both layers and both ranks
    block = reader.read("decoder.layers.mlp.linear_fc1.weight", box)
    assert torch.equal(block, stacked[0:2, 20:29, 3:8])
    for name in ("decoder.layers.2.mlp.linear_fc1.weight", "decoder.layers.x", "nothing"):
        with pytest.raises(KeyError):
            weights.read(name)


# ---------------------------------------------------------------- convert and diff


def test_a_copy_without_optimizer_is_a_checkpoint_like_any_other(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "weights"
    assert call("convert", run, target, "--weights-only") == 0
    assert verify(target) == []
    reader = CheckpointReader(target)
    assert reader.tensors.keys() == CheckpointReader(find_checkpoint(run)).weights.keys()
    assert "optimizer" not in reader.plain and reader.plain["train_state"]["step"] == 10
    assert (target / "config.yaml").read_text() == (run / "config.yaml").read_text()
    expected, found = (
        run_on_gloo(1, live_logits, folder, MODEL, IDS)[0]
        for folder in (find_checkpoint(run), target)
    )
    assert torch.equal(found, expected)
    capsys.readouterr()
    assert call("diff", run, target, "--weights-only") == 0
    assert capsys.readouterr().out.endswith(" tensors compared, 0 differ; equal\n")
    assert call("diff", run, target) == 1
    assert "tensors only in the first: 38" in capsys.readouterr().out
    with pytest.raises(FileExistsError, match="exists already"):
        call("convert", run, target)


@pytest.mark.parametrize("way", [[], ["--weights-only"], ["--safetensors"]])
def test_what_is_damaged_is_not_copied(copy: Path, tmp_path: Path, way: list[str]) -> None:
    """The copy's manifest would call it sound."""
    folder = find_checkpoint(copy)
    path = folder / "__1_0.distcp"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(DamagedCheckpointError, match=r"is damaged: __1_0\.distcp has checksum"):
        call("convert", copy, tmp_path / "out", *way)
    assert call("convert", copy, tmp_path / "out", *way, "--step", 2) == 0


def test_a_copy_of_what_cannot_be_compared_comes_with_a_warning(
    copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = find_checkpoint(copy)
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["files"]["__1_0.distcp"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DamagedCheckpointError, match=r"__1_0\.distcp is not in manifest\.json"):
        call("convert", copy, tmp_path / "out")
    (folder / "manifest.json").write_text("{")
    with pytest.raises(DamagedCheckpointError, match=r"manifest\.json cannot be read"):
        call("convert", copy, tmp_path / "out")
    write_manifest(folder, checksums=False)
    assert call("convert", copy, tmp_path / "sizes") == 0
    assert "warning: " in (said := capsys.readouterr().err) and "verify_integrity=false" in said
    (folder / "manifest.json").unlink()
    assert call("convert", copy, tmp_path / "out") == 0
    assert "has no manifest.json: nothing tells whether" in capsys.readouterr().err


@pytest.mark.parametrize("way", [[], ["--safetensors"]])
def test_a_copy_is_not_taken_for_another_step(copy: Path, tmp_path: Path, way: list[str]) -> None:
    inside = copy / "checkpoints"
    for name in ("step_00000099", "step_00000099.damaged"):
        with pytest.raises(ValueError, match="lies among the checkpoints of the run"):
            call("convert", copy, inside / name, *way)
    with pytest.raises(ValueError, match=r"the name of step 99, and .* of step 10; choose step_"):
        call("convert", copy, tmp_path / "step_00000099", *way)
    assert call("convert", copy, tmp_path / "step_00000010", *way) == 0
    assert call("convert", copy, inside / "weights", *way) == 0


def test_a_run_starts_from_weights_alone(run: Path, tmp_path: Path) -> None:
    """checkpoint.load with a copy that has no optimizer; going on from one is refused."""
    target = tmp_path / "weights"
    to_checkpoint(find_checkpoint(run), target, dtype=None, weights_only=True)
    weights = run_on_gloo(1, weights_of_a_new_run, tmp_path / "new", target)[0]
    expected = StoredWeights(CheckpointReader(target))
    assert weights.keys() == expected.shapes().keys()
    assert all(torch.equal(value, expected.read(name)) for name, value in weights.items())
    (tmp_path / "old/checkpoints").mkdir(parents=True)
    target.rename(tmp_path / "old/checkpoints/step_00000010")
    with pytest.raises(RankFailed, match="wanted and not stored"):
        run_on_gloo(1, weights_of_a_new_run, tmp_path / "old", target)


def weights_of_a_new_run(folder: Path, load: Path) -> dict[str, torch.Tensor]:
    """What an engine trains from in the run folder `folder` with checkpoint.load=`load`."""
    runtime = initialize(ParallelConfig(), 1)
    chunks = build_model(MODEL, ParallelConfig(), runtime, vocab_size=VOCAB, seed=77)
    engine = MegatronEngine(chunks, ParallelConfig(), OptimizerConfig(), runtime)
    identity = {"model": model_identity(MODEL, VOCAB)}
    config = CheckpointConfig(load=str(load))
    assert Checkpoints(folder / "checkpoints", config, identity).resume(engine) == TrainState()
    weights = {name: value.detach().clone() for name, value in global_parameters(chunks[0])}
    shutdown(runtime)
    return weights


def test_a_whole_copy_is_equal(run: Path, tmp_path: Path) -> None:
    assert call("convert", run, tmp_path / "copy") == 0
    assert call("diff", run, tmp_path / "copy") == 0


def test_bf16_leaves_routers_and_the_optimizer_alone(tmp_path: Path) -> None:
    run_on_gloo(1, write_trained_run, tmp_path / "run", SPARSE, ParallelConfig(), 1)
    source, target = find_checkpoint(tmp_path / "run"), tmp_path / "bf16"
    to_checkpoint(source, target, dtype=torch.bfloat16, weights_only=False)
    types = {name: stored.dtype for name, stored in CheckpointReader(target).tensors.items()}
    kept = {name for name in types if ".router." in name or name.startswith("optimizer.")}
    assert {types[name] for name in kept} == {"float32"}
    assert {types[name] for name in types.keys() - kept} == {"bfloat16"}
    found = compare(source, target)
    assert found.described and found.tensors
    assert 1e-4 < max(d.relative for d in found.tensors) < 2**-8
    original, rounded = (run_on_gloo(1, live_logits, f, SPARSE, IDS)[0] for f in (source, target))
    assert 0 < (original - rounded).abs().max() < 0.1


def test_differences_are_shown_largest_first(
    copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("diff", copy / "checkpoints/step_00000002", copy, "--weights-only") == 1
    said = capsys.readouterr().out
    assert "train_state.consumed_tokens: 64, 320" in said and "train_state.step: 2, 10" in said
    lines = said.partition("largest differences")[2].splitlines()[1:]
    sizes = [float(line.partition("(")[2].split()[0]) for line in lines if "elements" in line]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] > 0.1
    run_on_gloo(1, write_run, tmp_path / "wide", replace(MODEL, ffn_hidden_size=64))
    assert call("diff", copy, tmp_path / "wide", "--all", "--weights-only") == 1
    said = capsys.readouterr().out
    assert "identity.model.ffn_hidden_size: 48, 64" in said
    assert "decoder.layers.mlp.linear_fc1.weight: float32 [2, 48, 32], float32 [2, 64, 32]" in said


def test_nan_differs_from_numbers_and_not_from_nan(copy: Path) -> None:
    first, second = find_checkpoints(copy)
    name = "decoder.final_layernorm.weight"
    for folder in (first, second):
        put(folder, name, [float("nan")] * 2 + [1.0] * 30)
    assert name not in {d.name for d in compare(first, second, weights_only=True).tensors}
    put(second, name, [float("nan")] + [1.0] * 31)
    found = {d.name: d for d in compare(first, second, weights_only=True).tensors}[name]
    assert found.elements == 1 and found.largest == float("inf")


def put(folder: Path, name: str, values: list[float]) -> None:
    """Overwrite a stored tensor with as many values."""
    piece = CheckpointReader(folder).tensors[name].pieces[0]
    new = io.BytesIO()
    torch.save(torch.tensor(values), new)
    assert len(new.getvalue()) == piece.length
    with open(folder / piece.file, "r+b") as file:
        file.seek(piece.start)
        file.write(new.getvalue())


def test_safetensors_are_read_by_their_own_library(run: Path, tmp_path: Path) -> None:
    from safetensors import safe_open

    target = tmp_path / "tensors"
    assert call("convert", run, target, "--safetensors", "--max-file-gb", 5e-5) == 0
    assert verify(target) == []
    weights = StoredWeights(CheckpointReader(find_checkpoint(run)))
    where = json.loads((target / "model.safetensors.index.json").read_text())["weight_map"]
    assert where.keys() == weights.shapes().keys() and len(set(where.values())) > 1
    for name, file in where.items():
        with safe_open(target / file, framework="pt") as opened:
            assert torch.equal(opened.get_tensor(name), weights.read(name))
    values = json.loads((target / "checkpoint.json").read_text())
    assert values["train_state"]["step"] == 10
    with pytest.raises(ValueError, match=r"--max-file-gb=0\.0 must be above 0"):
        call("convert", run, tmp_path / "none", "--safetensors", "--max-file-gb", 0)


def test_safetensors_are_verified_by_their_manifest(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "tensors"
    assert call("convert", run, target, "--safetensors") == 0
    assert call("verify", target) == call("verify", target, "--full") == 0
    assert "tensors: sound (checksums)" in capsys.readouterr().out
    content = bytearray((target / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (target / "model.safetensors").write_bytes(content)
    assert (call("verify", target), call("verify", target, "--full")) == (0, 1)
    assert "model.safetensors has checksum" in capsys.readouterr().out
    for file in ("model.safetensors", "checkpoint.json"):  # one of them is enough to know it
        (target / file).rename(tmp_path / file)
        assert call("verify", target) == 1
        assert f"tensors: {file} is missing" in capsys.readouterr().out
        (tmp_path / file).rename(target / file)
    for words in (["diff", run, target], ["ls", target], ["convert", target, tmp_path / "again"]):
        with pytest.raises(FileNotFoundError, match="tensors holds safetensors and no checkpoint"):
            call(*words)


def test_safetensors_say_what_does_not_fit(tmp_path: Path) -> None:
    entries = [Entry("a", (2,), torch.float32), Entry("b", (), torch.bfloat16)]
    tensors = [torch.ones(2), torch.tensor(3.0, dtype=torch.bfloat16)]
    sums = write_sharded(tmp_path, "x", entries, tensors, 10**9)
    assert list(sums) == ["x.safetensors"]
    with pytest.raises(ValueError, match=r"a should be torch\.float32 \[2\], and is .*\[3\]"):
        write_sharded(tmp_path, "x", entries, [torch.ones(3)], 10**9)
    with pytest.raises(ValueError, match="fewer tensors than its header lists"):
        write_sharded(tmp_path, "x", entries, tensors[:1], 10**9)
    assert safetensors_file._parts(entries, 1) == [[entries[0]], [entries[1]]]
