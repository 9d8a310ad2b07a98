from __future__ import annotations

import io
import os
import pickle
import sys
import types
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from torch._dynamo.utils import counters
from torch.nn import functional as F

from farl import cli
from farl.tokens import DalleEncoder, convert_encoder_pickle, dalle
from farl.tokens.__main__ import main
from farl_engine.data import write_shards


def _small(vocab_size: int = 32, **options) -> DalleEncoder:
    torch.manual_seed(0)
    encoder = DalleEncoder(vocab_size, hidden=8, blocks_per_group=2, token_image_size=16, **options)
    for parameter in encoder.parameters():  # biases too
        nn.init.normal_(parameter, std=0.3)
    return encoder


def _images(batch: int = 3, size: int = 16) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (batch, size, size, 3), dtype=torch.uint8, generator=generator)


def _by_hand(state: dict[str, torch.Tensor], images: torch.Tensor, blocks: int) -> torch.Tensor:
    """Logits [B, V, h, w] in float64, written from the description of the architecture."""
    state = {name: value.double() for name, value in state.items()}

    def conv(name: str, x: torch.Tensor) -> torch.Tensor:
        weight = state[f"{name}.w"]
        return F.conv2d(x, weight, state[f"{name}.b"], padding=(weight.shape[-1] - 1) // 2)

    x = conv("blocks.input", 0.8 * (images.permute(0, 3, 1, 2).double() / 255) + 0.1)
    for group in range(1, 5):
        for block in range(1, blocks + 1):
            name = f"blocks.group_{group}.block_{block}"
            past = conv(f"{name}.id_path", x) if f"{name}.id_path.w" in state else x
            for i in range(1, 5):
                x = conv(f"{name}.res_path.conv_{i}", F.relu(x))
            x = past + x / (4 * blocks) ** 2
        if group < 4:
            x = F.max_pool2d(x, 2)
    return conv("blocks.output.conv", F.relu(x))


def test_layout_of_the_released_encoder() -> None:
    with torch.device("meta"):
        shapes = {name: tuple(value.shape) for name, value in DalleEncoder().state_dict().items()}
    assert len(shapes) == 2 + 8 * 8 + 3 * 2 + 2
    assert shapes["blocks.input.w"] == (256, 3, 7, 7) and shapes["blocks.input.b"] == (256,)
    assert "blocks.group_1.block_1.id_path.w" not in shapes
    assert shapes["blocks.group_2.block_1.id_path.w"] == (512, 256, 1, 1)
    assert shapes["blocks.group_2.block_1.res_path.conv_1.w"] == (128, 256, 3, 3)
    assert shapes["blocks.group_4.block_2.res_path.conv_4.w"] == (2048, 512, 1, 1)
    assert shapes["blocks.output.conv.w"] == (8192, 2048, 1, 1)


def test_logits_and_tokens_are_those_of_the_architecture() -> None:
    encoder, images = _small(), _images()
    expected = _by_hand(encoder.state_dict(), images, 2).flatten(2).transpose(1, 2)
    torch.testing.assert_close(encoder.logits(images).double(), expected, rtol=1e-4, atol=1e-4)
    tokens = encoder(images)
    assert tokens.shape == (3, 4) and tokens.dtype == torch.int64
    assert torch.equal(tokens, expected.argmax(-1)) and len(tokens.unique()) > 1
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(encoder(images), tokens)
        torch.testing.assert_close(encoder.logits(images).double(), expected, rtol=1e-4, atol=1e-4)


def test_positions_give_the_targets_of_the_masked_branch() -> None:
    encoder, images = _small(), _images()
    positions = torch.tensor([[0, 3], [2, -1], [-1, -1]], dtype=torch.int32)
    expected = encoder(images).gather(1, positions.long().clamp(min=0)).masked_fill(positions < 0, -1)
    assert torch.equal(encoder(images, positions), expected)


def test_last_convolution_runs_at_the_positions_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder, rows = _small(), []
    linear = F.linear

    def counted(x: torch.Tensor, *args: torch.Tensor) -> torch.Tensor:
        rows.append(x.numel() // x.shape[-1])
        return linear(x, *args)

    monkeypatch.setattr(F, "linear", counted)
    encoder(_images(), torch.zeros(3, 2, dtype=torch.int32))
    assert rows == [6]


def test_every_convolution_runs_channels_last() -> None:
    encoder, layouts = _small(), {}
    for name, module in encoder.named_modules():
        if hasattr(module, "w"):
            module.register_forward_hook(
                lambda _, given, made, name=name: layouts.update({name: (given[0].stride(), made.stride())})
            )
    encoder(_images(size=32))
    assert len(layouts) == 1 + 8 * 4 + 3  # the last one is a product of matrices
    assert all(stride[1] == 1 for strides in layouts.values() for stride in strides)


def test_large_batches_go_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder, images, sizes = _small(), _images(batch=7), []
    positions = torch.tensor([[0, 3], [2, -1], [-1, -1], [1, 2], [0, -1], [3, -1], [0, 1]], dtype=torch.int32)
    whole, chosen = encoder(images), encoder(images, positions)
    monkeypatch.setattr(dalle, "_PIXELS_AT_ONCE", 3 * 16 * 16)
    encoder.get_submodule("blocks.input").register_forward_hook(lambda _, given, made: sizes.append(len(made)))
    assert torch.equal(encoder(images), whole) and torch.equal(encoder(images, positions), chosen)
    assert sizes == [3, 3, 1] * 2
    sizes.clear()
    assert encoder(images[:4]).shape == (4, 4) and sizes == [2, 2]
    assert encoder(images[:0]).shape == (0, 4)


def test_logits_of_a_large_batch_are_made_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder, images, rows = _small(), _images(batch=5), []
    whole, linear = encoder(images), F.linear

    def counted(x: torch.Tensor, *args: torch.Tensor) -> torch.Tensor:
        rows.append(len(x))
        return linear(x, *args)

    monkeypatch.setattr(F, "linear", counted)
    monkeypatch.setattr(dalle, "_LOGITS_AT_ONCE", 6 * encoder.vocab_size)
    assert torch.equal(encoder(images), whole)
    assert rows == [5, 5, 5, 5]


def test_convolutions_run_in_the_asked_dtype_and_the_last_in_fp32() -> None:
    images = _images()
    half = _small(compute_dtype=torch.bfloat16)
    assert half.logits(images).dtype == torch.float32
    difference = (half.logits(images) - _small().logits(images)).abs().max()
    assert 1e-4 < difference < 1


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_stages_give_the_same_tokens(backend: str) -> None:
    encoder = _small(1024)
    compiled = DalleEncoder.from_state_dict(encoder.state_dict(), token_image_size=16)
    torch._dynamo.reset()
    counters.clear()
    compiled.compile(backend=backend)
    for images in (_images(), _images(batch=5)):
        assert torch.equal(compiled(images), encoder(images))
        torch.testing.assert_close(compiled.logits(images), encoder.logits(images))
    # Five stages, for one number of images and then for any.
    assert counters["stats"]["unique_graphs"] == 2 * 5 and not counters["graph_break"]
    assert compiled.state_dict().keys() == encoder.state_dict().keys()


def test_no_parameter_wants_a_gradient() -> None:
    assert not any(p.requires_grad for p in _small().parameters())


def _fake_dall_e(monkeypatch: pytest.MonkeyPatch) -> type[nn.Module]:
    """Modules named as OpenAI's package, with classes of the same names and attributes."""

    class Conv2d(nn.Module):
        def __init__(self, weight: torch.Tensor, bias: torch.Tensor) -> None:
            super().__init__()
            self.n_in, self.use_float16, self.device = weight.shape[1], True, torch.device("cpu")
            self.w, self.b = nn.Parameter(weight), nn.Parameter(bias)

    class EncoderBlock(nn.Module):
        pass

    class Encoder(nn.Module):
        def __init__(self, state: dict[str, torch.Tensor]) -> None:
            super().__init__()
            self.group_count, self.device, self.requires_grad = 4, torch.device("cpu"), False
            for name in state:
                if name.endswith(".w"):
                    self._put(name[:-2].split("."), Conv2d(state[name], state[name[:-1] + "b"]))

        def _put(self, path: list[str], conv: nn.Module) -> None:
            node: nn.Module = self
            for part in path[:-1]:
                if part not in dict(node.named_children()):
                    child = EncoderBlock() if part.startswith("block_") else nn.Sequential()
                    node.add_module(part, child)
                    if isinstance(child, EncoderBlock):
                        child.add_module("id_path", nn.Identity())
                node = node.get_submodule(part)
            node.add_module("relu_1", nn.ReLU())
            node.add_module("pool", nn.MaxPool2d(2))
            node.add_module(path[-1], conv)

    for module, classes in (("dall_e.encoder", (Encoder, EncoderBlock)), ("dall_e.utils", (Conv2d,))):
        made = types.ModuleType(module)
        for cls in classes:
            cls.__module__, cls.__qualname__ = module, cls.__name__
            setattr(made, cls.__name__, cls)
        monkeypatch.setitem(sys.modules, module, made)
    monkeypatch.setitem(sys.modules, "dall_e", types.ModuleType("dall_e"))
    return Encoder


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("zipped", [True, False])
def test_pickled_encoder_is_converted_without_its_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, zipped: bool
) -> None:
    encoder = _small()
    with monkeypatch.context() as inside:
        pickled = _fake_dall_e(inside)(encoder.state_dict())
        torch.save(pickled, tmp_path / "encoder.pkl", _use_new_zipfile_serialization=zipped)
    assert "dall_e" not in sys.modules
    converted = convert_encoder_pickle(tmp_path / "encoder.pkl", tmp_path / "encoder.safetensors")
    assert torch.equal(converted(_images()), encoder(_images()))
    state = load_file(tmp_path / "encoder.safetensors")
    assert state.keys() == encoder.state_dict().keys()
    assert all(torch.equal(value, state[name]) for name, value in encoder.state_dict().items())
    loaded = DalleEncoder.from_file(tmp_path / "encoder.safetensors", token_image_size=24)
    assert (loaded.vocab_size, loaded.token_image_size) == (32, 24)


def test_saved_state_dict_is_converted(tmp_path: Path) -> None:
    encoder = _small()
    torch.save(encoder.state_dict(), tmp_path / "state.pt")
    converted = convert_encoder_pickle(tmp_path / "state.pt", tmp_path / "out.safetensors")
    assert torch.equal(converted(_images()), encoder(_images()))


class _Hostile:
    def __init__(self, function: object, *arguments: object) -> None:
        self._call = function, arguments

    def __reduce__(self) -> tuple:
        return self._call


@pytest.mark.parametrize("form", ["torch", "legacy", "plain"])
@pytest.mark.parametrize("attack", ["system", "eval", "getattr"])
def test_hostile_pickles_run_nothing(tmp_path: Path, attack: str, form: str) -> None:
    proof = tmp_path / "ran"
    hostile = {
        "system": _Hostile(os.system, f"touch {proof}"),
        "eval": _Hostile(eval, f"open({str(proof)!r}, 'w')"),
        "getattr": _Hostile(getattr, "text", "upper"),
    }[attack]
    path = tmp_path / "encoder.pkl"
    if form == "plain":
        path.write_bytes(pickle.dumps(hostile))
    else:
        torch.save({"blocks.input.w": hostile}, path, _use_new_zipfile_serialization=form == "torch")
    with pytest.raises(ValueError, match=r"encoder.pkl: not OpenAI's encoder.pkl"):
        convert_encoder_pickle(path, tmp_path / "out.safetensors")
    assert not proof.exists() and not (tmp_path / "out.safetensors").exists()


def test_the_attack_would_work_on_a_plain_load(tmp_path: Path) -> None:
    """The test above fails where the file is unpickled freely."""
    torch.save(_Hostile(os.system, f"touch {tmp_path / 'ran'}"), tmp_path / "encoder.pkl")
    torch.load(tmp_path / "encoder.pkl", weights_only=False)
    assert (tmp_path / "ran").exists()


def test_files_that_do_not_fit_are_refused_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.safetensors"
    with pytest.raises(ValueError, match=r"no such file"):
        convert_encoder_pickle(tmp_path / "missing.pkl", out)
    (tmp_path / "page.pkl").write_text("<html>404</html>")
    with pytest.raises(ValueError, match=r"not OpenAI's encoder.pkl"):
        convert_encoder_pickle(tmp_path / "page.pkl", out)
    torch.save({"weight": torch.zeros(3)}, tmp_path / "other.pkl")
    with pytest.raises(ValueError, match=r"not the weights of a DALL-E encoder"):
        convert_encoder_pickle(tmp_path / "other.pkl", out)
    short = {name: value for name, value in _small().state_dict().items() if "group_3" not in name}
    with pytest.raises(ValueError, match=r"not the weights of a DALL-E encoder") as caught:
        DalleEncoder.from_state_dict(short)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=r"no such file"):
        DalleEncoder.from_file(out)
    with pytest.raises(ValueError, match=r"convert"):
        DalleEncoder.from_file(tmp_path / "other.pkl")
    with pytest.raises(ValueError, match=r"the folder .*absent is not there; make it first"):
        convert_encoder_pickle(tmp_path / "other.pkl", tmp_path / "absent" / "out.safetensors")
    with pytest.raises(SystemExit) as leaving:
        cli.run(lambda: main(["convert", str(tmp_path / "page.pkl"), str(out)]), "farl.tokens")
    assert leaving.value.code == 1 and not out.exists()
    assert capsys.readouterr().err.startswith(f"farl.tokens: {tmp_path / 'page.pkl'}: not OpenAI's encoder.pkl")


def test_command_converts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(_small().state_dict(), tmp_path / "encoder.pkl")
    assert main(["convert", str(tmp_path / "encoder.pkl"), str(tmp_path / "out.safetensors")]) == 0
    assert "32 tokens" in capsys.readouterr().out


def _photographs(folder: Path, broken: bool = False) -> Path:
    """A shard of ten pictures, or of ten files that are none."""
    samples = []
    for i, picture in enumerate(_images(batch=10, size=48).numpy()):
        buffer = io.BytesIO()
        Image.fromarray(picture).save(buffer, "PNG")
        samples.append({"key": f"{i:03d}", "image": b"none" if broken else buffer.getvalue(), "caption": "a picture"})
    return write_shards(samples, folder / "pictures-%d.tar")[0]


def test_command_reports_the_agreement(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file(_small().state_dict(), tmp_path / "encoder.safetensors")
    words = ["agreement", str(tmp_path / "encoder.safetensors"), "--model", "farl-tiny", "--device", "cpu"]
    assert main([*words, "--data", str(_photographs(tmp_path)), "--limit", "9"]) == 0
    told = capsys.readouterr().out.splitlines()
    # farl-tiny has 8 x 8 patches.
    assert told[-3].startswith("576 cells of images of 64 pixels, on cpu")
    assert [line.partition(" ")[0] for line in told[-2:]] == ["fp16:", "bf16:"]
    assert "% of the tokens are those of fp32" in told[-1]
    with pytest.raises(SystemExit) as leaving:
        main([*words, "--data", "x", "--limit", "0"])
    assert leaving.value.code == 2
    (tmp_path / "bad").mkdir()
    with pytest.raises(ValueError, match="none of the 10 images"):
        main([*words, "--data", str(_photographs(tmp_path / "bad", broken=True))])


def test_wrong_arguments_are_named() -> None:
    encoder = _small()
    with pytest.raises(ValueError, match=r"^images: "):
        encoder(_images().float())
    with pytest.raises(ValueError, match=r"^images: "):
        encoder(_images(size=20))
    with pytest.raises(ValueError, match=r"^positions: "):
        encoder(_images(), torch.zeros(2, 2, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"^token_image_size: "):
        DalleEncoder(32, hidden=8, token_image_size=100)
    with pytest.raises(ValueError, match=r"^hidden: "):
        DalleEncoder(32, hidden=6)
