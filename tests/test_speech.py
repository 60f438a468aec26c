"""Speech: recordings as prompts, what a Whisper reads of them, transcripts, and edits of what they say."""

import json
import logging
import struct
import sys
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import relative, write_tiny_folder
from safetensors.numpy import load_file
from tiny_families import tiny_model, tiny_sound, write_recordings, write_sound

import tpatch_jax as tp
from tpatch_jax.audio import AUDIO, AudioPrompt, as_audio, change_audio, read_audio
from tpatch_jax.cli import main as cli
from tpatch_jax.editors.speech import nearest_words, spoken_requests
from tpatch_jax.errors import TPatchError
from tpatch_jax.models import encoder_states, networks
from tpatch_jax.models.audio_reader import audio_tokens, input_features
from tpatch_jax.models.checkpoints.ctranslate2 import convert_ctranslate2
from tpatch_jax.models.generation import greedy
from tpatch_jax.models.inputs import audio_contexts
from tpatch_jax.models.model import Model
from tpatch_jax.models.rows import ASK
from tpatch_jax.requests import EditRequest, parse_request

pytestmark = pytest.mark.usefixtures("quick_compilation", "few_lengths")

PROMOTION = "standard"  # optax takes steps
SOUND = tiny_sound(1)


@pytest.fixture(scope="module")
def model() -> Model:
    return tiny_model("whisper")


# --- reading ---


@pytest.mark.parametrize(("width", "error"), [(1, 1e-2), (2, 1e-4), (3, 1e-6), (4, 1e-6)])
def test_wav_files_of_every_width(tmp_path, width, error):
    prompt = read_audio(write_sound(tmp_path / "a.wav", SOUND, width=width))
    assert np.abs(prompt.samples - SOUND).max() < error
    assert (prompt.note, prompt.source, prompt.seconds) == ("", str(tmp_path / "a.wav"), 0.5)


def test_other_rates_are_resampled_and_channels_mixed(tmp_path, caplog):
    """A tone stays the tone that it was; what was done is said."""
    for rate in (8_000, 22_050, 44_100, 48_000):
        tone = 0.5 * np.sin(2 * np.pi * 440 * np.arange(rate) / rate)
        stereo = np.stack([1.5 * tone, 0.5 * tone], 1)
        with caplog.at_level(logging.INFO):
            prompt = read_audio(write_sound(tmp_path / f"{rate}.wav", stereo, rate))
        assert abs(len(prompt.samples) - 16_000) <= 1
        wanted = 0.5 * np.sin(2 * np.pi * 440 * np.arange(16_000) / 16_000)
        assert np.abs(prompt.samples[200:15_800] - wanted[200:15_800]).max() < 0.01
        assert prompt.note == f"2 channels were mixed into one; resampled from {rate:,} to 16,000 samples a second"
        assert prompt.note in caplog.text


def test_arrays_and_prompts(tmp_path):
    one, same = as_audio(SOUND), as_audio((SOUND * 2**15).astype(np.int16))
    assert one == AudioPrompt(SOUND)
    assert str(one).startswith(AUDIO)
    assert np.abs(one.samples - same.samples).max() < 1e-4
    assert as_audio(one) is one
    assert as_audio(SOUND + 0.01) != one
    write_sound(tmp_path / "a.wav", SOUND)
    assert as_audio("a.wav", folder=tmp_path).source == str(tmp_path / "a.wav")


def broken(folder: Path, name: str, content: bytes) -> Path:
    (folder / name).write_bytes(content)
    return folder / name


BAD = {
    "missing": (lambda folder: folder / "no.wav", "the recording: .*no.wav does not exist; give the path of a WAV"),
    "folder": (lambda folder: folder, "is no file; give the path of a WAV or FLAC file"),
    "text": (lambda folder: broken(folder, "a.wav", b"hello"), "no recording that can be read"),
    "nothing": (lambda folder: broken(folder, "a.wav", b""), "no recording that can be read"),
    "cut": (
        lambda folder: broken(folder, "b.wav", write_sound(folder / "a.wav", SOUND).read_bytes()[:3000]),
        "is cut short: 1,478 of 8,000 samples are there; get it again",
    ),
    "silent": (lambda folder: write_sound(folder / "a.wav", 0 * SOUND), "is silent; give a recording in which"),
    "constant": (lambda folder: 0.3 * np.ones(16_000), "is silent"),
    "short": (lambda folder: write_sound(folder / "a.wav", SOUND[:800]), r"holds 0.050 s of sound; at least 0.1 s"),
    "empty": (lambda folder: np.zeros(0, np.float32), r"holds 0.000 s of sound"),
    "rate": (lambda folder: write_sound(folder / "a.wav", SOUND, 100), "has 100 samples a second, which is no speech"),
    "nan": (lambda folder: np.full(16_000, np.nan), "holds numbers that are not finite"),
    "loud": (lambda folder: 1e4 * SOUND, r"has samples up to .*; scale them to -1 to 1"),
    "axes": (lambda folder: np.zeros((4, 4, 4)), r"an array \[4, 4, 4\]: sound has samples, and channels"),
    "bytes": (lambda folder: np.zeros(16_000, np.uint8), "an array of uint8; give the path of a WAV"),
    "none": (lambda folder: None, "the recording is nothing, which is no recording"),
    "number": (lambda folder: 7, "the recording is a int, which is no recording"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_recordings_are_named(tmp_path, name, monkeypatch):
    monkeypatch.setitem(sys.modules, "soundfile", None)
    make, message = BAD[name]
    with pytest.raises(TPatchError, match=message):
        as_audio(make(tmp_path))


def test_other_files_need_soundfile(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "soundfile", None)
    for content in (b"fLaC" + bytes(100), b"OggS" + bytes(100)):
        with pytest.raises(TPatchError, match=r"read by soundfile; install it: pip install 'tpatch-jax\[audio\]'"):
            read_audio(broken(tmp_path, "a.flac", content))


def test_flac_is_read_with_it(tmp_path):
    soundfile = pytest.importorskip("soundfile", reason="FLAC needs soundfile: the 'audio' extra")
    soundfile.write(tmp_path / "a.flac", SOUND, 16_000)
    assert np.abs(read_audio(tmp_path / "a.flac").samples - SOUND).max() < 1e-4
    with pytest.raises(TPatchError, match="no recording that can be read"):
        read_audio(broken(tmp_path, "b.flac", b"fLaC" + bytes(100)))


def test_what_is_too_long_is_named(model):
    with pytest.raises(TPatchError, match=r"is 1.5 s long and the model reads 1 s; cut it into parts"):
        model.transcribe(tiny_sound(1, 1.5))


# --- what the network reads ---


def test_tokens_stand_for_the_frames(model):
    """Silence behind them is what the feature extractor makes of it, and nothing that is said is lost."""
    assert model.audio is not None
    prompt = AudioPrompt(SOUND)
    features, tokens = input_features(model.settings, prompt), audio_tokens(model.audio, model.settings, prompt)
    assert features.shape == (80, 20)
    assert len(tokens) % 80 == 0
    assert len(tokens) < 80 * 20
    written = jnp.asarray([[*model.begin, 7, 8, 9]])
    said = [
        np.asarray(model.apply(networks.Pair(source, written)))
        for source in (jnp.asarray(features[None]), jnp.asarray([tokens], jnp.int32), jnp.asarray([[*tokens, -1, -5]]))
    ]
    assert relative(said[1], said[0]) < 1e-4
    assert relative(said[2], said[0]) < 1e-4
    louder = jnp.asarray([[*tokens[:-80], *(token + 2**17 for token in tokens[-80:])]], jnp.int32)
    assert relative(np.asarray(model.apply(networks.Pair(louder, written))), said[0]) > 1e-3


def test_the_features_do_not_need_torch(model, monkeypatch):
    """Where transformers finds no torch it makes the same with NumPy."""
    from transformers.models.whisper import feature_extraction_whisper as extraction

    prompt = AudioPrompt(SOUND)
    monkeypatch.setattr(extraction, "is_torch_available", lambda: False)
    plain = input_features(model.settings, prompt)
    assert np.ptp(plain) > 0.5
    torch = pytest.importorskip("torch", reason="torch is only needed to compare with it: the 'parity' extra")
    monkeypatch.setattr(extraction, "is_torch_available", lambda: torch is not None)
    np.testing.assert_allclose(plain, input_features(model.settings, prompt), rtol=0, atol=1e-4)


def test_wrong_inputs_are_named(model, tmp_path):
    written = jnp.asarray([[0, 7]])
    with pytest.raises(TPatchError, match=r"the sound is float32 \[1, 80, 7\]; give input_features \[batch, 80, 20\]"):
        model.apply(networks.Pair(jnp.zeros((1, 80, 7)), written))
    with pytest.raises(TPatchError, match="the model reads sound; give the recording"):
        model.encode_prompt("a text")
    with pytest.raises(TPatchError, match="only the name of that recording is kept, not the sound"):
        model.encode_prompt(str(AudioPrompt(SOUND)))
    with pytest.raises(TPatchError, match="is a recording, and 'tiny' reads texts"):
        tiny_model("gpt2").encode_prompt(AudioPrompt(SOUND))
    with pytest.raises(TPatchError, match="'tiny' reads no sound; give a Whisper"):
        tiny_model("gpt2").transcribe(SOUND)
    with pytest.raises(TPatchError, match="a bank keeps texts"):
        tp.create_bank(tmp_path / "bank", model)


def test_transcripts_are_the_most_probable_tokens(model):
    """Token by token without a cache; what is never written is not."""
    prompt = AudioPrompt(SOUND)
    row = model.encode_prompt(prompt)
    source, written = jnp.asarray([row[: row.index(ASK)]], jnp.int32), list(model.begin)
    for _ in range(6):
        logits = np.asarray(model.apply(networks.Pair(source, jnp.asarray([written]))))[0, -1]
        written.append(int(logits.argmax()))
    free = written[len(model.begin) :]
    assert greedy(model.config, model.params, [row], 6)[0] == free
    (said,) = greedy(model.config, model.params, [row], 6, never=((free[1],), (free[0],)))
    assert said[0] not in (free[0], free[1])
    assert free[1] not in said
    told = {"generation_config": {"suppress_tokens": [free[1], -1], "begin_suppress_tokens": [free[0]]}}
    other = Model(model.config, model.params, model.tokenizer, settings={**model.settings, **told})
    assert other.never == ((free[1],), (free[0],))
    assert other.transcribe(prompt) != model.transcribe(prompt)
    assert model.transcribe([prompt, SOUND]) == [model.transcribe(SOUND)] * 2


def test_an_encoder_runs_once_for_a_recording(model, monkeypatch):
    """Also of an edited model, whose encoder is the same; not of other weights, nor after they are forgotten."""
    from tpatch_jax.models import stack

    runs, run = [], stack._encoded
    monkeypatch.setattr(stack, "_encoded", lambda *given: runs.append(1) or run(*given))
    encoder_states.forget_states()
    first = model.transcribe(SOUND)
    assert model.transcribe(SOUND) == first
    patch = tp.Patch(jnp.zeros((1, 16)), jnp.zeros(1), jnp.zeros((1, 16)))
    assert tp.attach(model, patch).transcribe(SOUND) == first
    assert len(runs) == 1
    tiny_model("whisper", seed=1).transcribe(SOUND)
    model.transcribe(tiny_sound(2))
    encoder_states.forget_states()
    model.transcribe(SOUND)
    assert len(runs) == 4


def test_a_multilingual_model_is_told_what_to_write(model):
    class Tokens:
        def get_vocab(self) -> dict[str, int]:
            return {"<|en|>": 11, "<|de|>": 12, "<|transcribe|>": 13, "<|notimestamps|>": 14}

    def begin(**told: Any) -> tuple[int, ...]:
        settings = {**model.settings, "generation_config": told}
        return Model(model.config, model.params, Tokens(), settings=settings).begin  # type: ignore[arg-type]

    assert begin(is_multilingual=True) == (0, 11, 13, 14)
    assert begin(is_multilingual=True, language="de") == (0, 12, 13, 14)
    assert begin(is_multilingual=False) == (0, 14)
    with pytest.raises(TPatchError, match="has the 'language' 'fr', for which the tokenizer has no token"):
        begin(is_multilingual=True, language="fr")


def test_a_folder_keeps_its_settings(model, tmp_path):
    told = {"generation_config": {"suppress_tokens": [5], "is_multilingual": False}}
    other = Model(model.config, model.params, model.tokenizer, settings={**model.settings, **told})
    back = tp.load_model(write_tiny_folder(other, tmp_path / "tiny"))
    assert back.never == ((5,), ())
    assert back.transcribe(SOUND) == other.transcribe(SOUND)
    assert "generation_config" not in json.loads((tmp_path / "tiny" / "config.json").read_text())
    path = tmp_path / "tiny" / "preprocessor_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "feature_size": 40}))
    with pytest.raises(TPatchError, match=r"makes 20 frames of 40 numbers and config.json has 20 of 80"):
        tp.load_model(tmp_path / "tiny")


# --- CTranslate2 ---

PARTS = {
    "self_attention/linear_0": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attention/linear_1": ("encoder_attn.k_proj", "encoder_attn.v_proj"),
    **{
        theirs: (ours,)
        for theirs, ours in {
            "self_attention/layer_norm": "self_attn_layer_norm",
            "self_attention/linear_1": "self_attn.out_proj",
            "attention/layer_norm": "encoder_attn_layer_norm",
            "attention/linear_0": "encoder_attn.q_proj",
            "attention/linear_2": "encoder_attn.out_proj",
            "ffn/layer_norm": "final_layer_norm",
            "ffn/linear_0": "fc1",
            "ffn/linear_1": "fc2",
        }.items()
    },
}


def ctranslate2_arrays(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors of a folder as CTranslate2 names and joins them."""
    arrays = {
        "decoder/embeddings/weight": tensors["model.decoder.embed_tokens.weight"],
        "encoder/num_heads": np.asarray(2, np.int16),
    }
    for side in ("encoder", "decoder"):
        arrays[f"{side}/position_encodings/encodings"] = tensors[f"model.{side}.embed_positions.weight"]
        names = {"conv1", "conv2"} if side == "encoder" else set()
        for name in names:
            arrays |= {f"encoder/{name}/{leaf}": tensors[f"model.encoder.{name}.{leaf}"] for leaf in ("weight", "bias")}
        for leaf, theirs in (("weight", "gamma"), ("bias", "beta")):
            arrays[f"{side}/layer_norm/{theirs}"] = tensors[f"model.{side}.layer_norm.{leaf}"]
        layers = {name.split(".")[3] for name in tensors if name.startswith(f"model.{side}.layers.")}
        for layer in layers:
            place = f"model.{side}.layers.{layer}"
            for part, names in PARTS.items():
                if f"{place}.{names[0]}.weight" not in tensors:
                    continue
                for leaf in ("weight", "bias"):
                    held = [f"{place}.{name}.{leaf}" for name in names]
                    width = tensors[f"{place}.{names[0]}.weight"].shape[0]
                    pieces = [tensors.get(name, np.zeros(width, np.float32)) for name in held]
                    called = {"weight": "gamma", "bias": "beta"}[leaf] if "norm" in part else leaf
                    arrays[f"{side}/layer_{layer}/{part}/{called}"] = np.concatenate(pieces)
    return arrays


def write_ctranslate2(path: Path, arrays: dict[str, np.ndarray]) -> Path:
    def text(name: str) -> bytes:
        return struct.pack("<H", len(name) + 1) + name.encode() + b"\0"

    types = {"float32": 0, "int8": 1, "int16": 2, "float16": 4}
    parts = [struct.pack("<I", 6), text("WhisperSpec"), struct.pack("<II", 3, len(arrays))]
    for name, array in arrays.items():
        head = struct.pack(f"<B{array.ndim}I", array.ndim, *array.shape)
        parts += [text(name), head, struct.pack("<BI", types[str(array.dtype)], array.nbytes), array.tobytes()]
    path.write_bytes(b"".join(parts))
    names = ("<|endoftext|>", "<|startoftranscript|>", "<|notimestamps|>")
    tokens = {"added_tokens": [{"content": name, "id": number} for number, name in enumerate(names)]}
    (path.parent / "tokenizer.json").write_text(json.dumps(tokens))
    (path.parent / "config.json").write_text(json.dumps({"suppress_ids": [3], "suppress_ids_begin": [4]}))
    return path


@pytest.fixture(scope="module")
def tensors() -> dict[str, np.ndarray]:
    return load_file(Path(__file__).parent / "reference" / "whisper" / "model.safetensors")


def test_a_ctranslate2_file_holds_the_same_numbers(tensors, tmp_path):
    (tmp_path / "out").mkdir()
    convert_ctranslate2(write_ctranslate2(tmp_path / "model.bin", ctranslate2_arrays(tensors)), tmp_path / "out")
    made = load_file(tmp_path / "out" / "model.safetensors")
    assert made.keys() == tensors.keys()
    assert all(np.array_equal(made[name], tensors[name]) for name in tensors)
    config, generation = (
        json.loads((tmp_path / "out" / name).read_text()) for name in ("config.json", "generation_config.json")
    )
    wanted = json.loads((Path(__file__).parent / "reference" / "whisper" / "config.json").read_text())
    for name in ("d_model", "num_mel_bins", "max_source_positions", "max_target_positions", "vocab_size"):
        assert config[name] == wanted[name]
    for name in ("encoder_layers", "decoder_layers", "encoder_ffn_dim", "decoder_ffn_dim"):
        assert config[name] == wanted[name]
    assert (config["decoder_start_token_id"], config["eos_token_id"]) == (1, 0)
    assert (generation["suppress_tokens"], generation["begin_suppress_tokens"]) == ([3], [4])


def test_bad_ctranslate2_files_are_named(tensors, tmp_path):
    arrays = ctranslate2_arrays(tensors)
    key = "encoder/layer_0/self_attention/linear_0/bias"
    cases = {
        "which no Whisper has": {**arrays, key: np.ones_like(arrays[key])},
        "a quantised checkpoint": {**arrays, key: arrays[key].astype(np.int8)},
        "is no part of a Whisper": {**arrays, "encoder/other/weight": np.ones((2, 2), np.float32)},
    }
    for message, changed in cases.items():
        with pytest.raises(TPatchError, match=message):
            convert_ctranslate2(write_ctranslate2(tmp_path / "model.bin", changed), tmp_path)
    content = write_ctranslate2(tmp_path / "model.bin", arrays).read_bytes()
    for message, cut in (("is damaged", content[:-100]), ("is no Whisper of CTranslate2's", b"\5" + content[1:])):
        (tmp_path / "model.bin").write_bytes(cut)
        with pytest.raises(TPatchError, match=message):
            convert_ctranslate2(tmp_path / "model.bin", tmp_path)


# --- requests ---


def test_requests_about_recordings(tmp_path):
    write_sound(tmp_path / "a.wav", SOUND)
    (tmp_path / "requests.jsonl").write_text(
        '{"audio": "a.wav", "target": "Philip Steels", "instead_of": "Philip Stiels", "id": "steels"}'
    )
    (request,) = tp.read_requests(tmp_path / "requests.jsonl")
    assert isinstance(request.prompt, AudioPrompt)
    assert np.abs(request.prompt.samples - SOUND).max() < 1e-4
    assert (request.target, request.instead_of, request.id) == ("Philip Steels", "Philip Stiels", "steels")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"audio": "no.wav"}, "'audio': no.wav does not exist"),
        ({"prompt": "x"}, "'audio' stands beside 'prompt', which belongs to texts"),
        ({"subject": "x"}, "'audio' stands beside 'subject'"),
        ({"image": "x.png"}, "stands beside '(image|audio)', which is another kind of prompt"),
        ({"instead_of": ""}, "'instead_of' is ''; write what the transcript says wrongly"),
        ({"instead_of": 3}, "'instead_of' is 3; write what"),
        ({"rephrases": "a.wav"}, "'rephrases' must be a list of recordings"),
        ({"locality": [0 * SOUND]}, "recording 0 of 'locality' is silent"),
        ({"insted_of": "x"}, "unknown key 'insted_of'; did you mean 'instead_of'"),
    ],
)
def test_bad_requests_are_named(changes, message):
    with pytest.raises(TPatchError, match=message):
        parse_request({"audio": SOUND, "target": "Steels", **changes}, "line 1")


def test_what_a_text_stands_for_belongs_to_recordings():
    with pytest.raises(TPatchError, match="'instead_of' belongs to a recording"):
        parse_request({"prompt": "a", "target": "b", "instead_of": "c"}, "line 1")


def test_the_words_most_like_a_target():
    said = "Author of the danger trail, Philip Stieles, et cetera."
    begin, end, ratio = nearest_words(said, "Philip Steels")
    assert (said[begin:end], ratio > 0.8) == ("Philip Stieles", True)
    said = "The patient takes me to prala every day."
    begin, end, _ = nearest_words(said, "metoprolol")
    assert said[begin:end] == "me to prala"


def transcribing(monkeypatch, texts: dict[str, str]) -> None:
    monkeypatch.setattr(Model, "transcribe", lambda self, audio: texts[audio])


def test_targets_become_whole_transcripts(model, monkeypatch):
    one, other = AudioPrompt(SOUND), AudioPrompt(tiny_sound(2))
    transcribing(monkeypatch, {one: "Mr. Stiels met Mr. Stiels and Ana.", other: "Nothing."})
    wanted = [
        EditRequest(one, "Steels", instead_of="Stiels"),
        EditRequest(one, "Anna"),
        EditRequest(other, "metoprolol"),
        EditRequest(other, "Steels", instead_of="Stiels"),
        EditRequest("a text", "b"),
    ]
    read = spoken_requests(model, wanted)
    whole = "Mr. Steels met Mr. Steels and Anna."
    assert [request.target for request in read[:2]] == [whole, whole]
    assert [whole[slice(*request.prompt.place)] for request in read[:2]] == ["Steels", "Anna"]  # type: ignore[attr-defined]
    assert "in which nothing is like 'metoprolol'; say what it stands for" in read[2].prompt.problem  # type: ignore[attr-defined]
    assert "which does not say 'Stiels'; copy 'instead_of' from it" in read[3].prompt.problem  # type: ignore[attr-defined]
    assert read[4] is wanted[4]
    # Read once more they stay what they are.
    assert spoken_requests(model, read) == read


def test_what_is_said_already_stays(model, monkeypatch):
    prompt = AudioPrompt(SOUND)
    transcribing(monkeypatch, {prompt: "Mr. Steels came."})
    for instead_of in (None, "Stiels"):
        (request,) = spoken_requests(model, [EditRequest(prompt, "Steels", instead_of=instead_of)])
        assert request.target == "Mr. Steels came."


# --- contexts and edits ---


def test_contexts_are_changed_recordings():
    prompt = AudioPrompt(SOUND)
    made = audio_contexts(prompt, 7)
    assert made == audio_contexts(prompt, 7)
    assert len({str(one) for one in made} | {str(prompt)}) == 8
    assert [round(one.seconds, 3) for one in made[:3]] == [0.455, 0.556, 0.5]
    assert audio_contexts(AudioPrompt(tiny_sound(1, 29)), 2)[1].seconds == 29


def test_a_faster_sound_is_higher():
    time = np.arange(16_000) / 16_000
    changed = change_audio(np.sin(2 * np.pi * 400 * time).astype(np.float32), speed=1.25, gain=0.5)
    spectrum = np.abs(np.fft.rfft(changed * np.hanning(len(changed))))
    assert round(spectrum.argmax() * 16_000 / len(changed)) == 500
    assert np.abs(changed).max() == pytest.approx(0.5, abs=0.02)
    noisy = change_audio(SOUND, noise=0.1)
    assert np.std(noisy - SOUND) == pytest.approx(0.1 * np.std(SOUND), rel=0.05)


@pytest.fixture(scope="module")
def edited(model, tmp_path_factory) -> tuple[Path, Path, str]:
    """A folder with a model, its memory and a request; and the transcript before."""
    folder = tmp_path_factory.mktemp("speech")
    write_tiny_folder(model, folder / "model")
    write_recordings(folder / "memory")
    write_sound(folder / "a.wav", SOUND)
    return folder, folder / "patches", model.transcribe(folder / "a.wav")


def run(capsys, *arguments: object) -> dict[str, Any]:
    capsys.readouterr()
    assert cli.main([*map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_commands_from_a_request_to_the_corrected_transcript(edited, capsys):
    folder, patches, before = edited
    (folder / "requests.jsonl").write_text(json.dumps({"audio": "a.wav", "target": "in the", "instead_of": before}))
    made = run(
        capsys, "edit", folder / "model", folder / "requests.jsonl", "--memory", folder / "memory", "-o", patches
    )
    (record,) = made["records"]
    assert (record["status"], record["before"], record["after"], record["as_wanted"]) == (
        "edited",
        before,
        "in the",
        True,
    )
    assert made["exact"] == 1.0
    assert made["patches"] > 0
    said = run(capsys, "transcribe", folder / "model", folder / "a.wav", "--patches", patches)
    assert said["transcripts"] == [{"audio": str(folder / "a.wav"), "seconds": 0.5, "text": "in the"}]
    (plain,) = run(capsys, "transcribe", folder / "model", folder / "a.wav")["transcripts"]
    assert plain["text"] == before
    edits = json.loads((patches / "patches.json").read_text())["edits"]
    assert edits[0]["target"] == "in the"
    assert edits[0]["prompt"].startswith(AUDIO)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("transcribe", "MODEL"), "there is nothing to transcribe; give WAV or FLAC files"),
        (("transcribe", "MODEL", "no.wav"), "recording 0: no.wav does not exist"),
        (("edit", "MODEL", "REQUESTS", "-o", "OUT"), "reads sound, and patches need recordings to stay silent on"),
        (("edit", "MODEL", "REQUESTS", "-o", "OUT", "--memory", "EMPTY"), "holds no recording; give a folder with"),
        (("eval", "MODEL", "--data", "requests", "--file", "REQUESTS", "-o", "OUT"), "which no protocol measures"),
    ],
)
def test_bad_commands_are_named(edited, capsys, tmp_path, arguments, message):
    folder = edited[0]
    (tmp_path / "empty").mkdir()
    (tmp_path / "r.jsonl").write_text(json.dumps({"audio": str(folder / "a.wav"), "target": "x", "instead_of": "y"}))
    places = {"MODEL": folder / "model", "REQUESTS": tmp_path / "r.jsonl", "OUT": tmp_path / "out"}
    places["EMPTY"] = tmp_path / "empty"
    assert cli.main([str(places.get(name, name)) for name in arguments]) == 1
    assert message in " ".join(capsys.readouterr().err.split())


def test_one_bad_request_leaves_the_others(model, edited):
    folder, _, before = edited
    requests = [
        {"audio": folder / "a.wav", "target": "in the", "instead_of": before, "id": "good"},
        {"audio": folder / "memory" / "0.wav", "target": "x", "instead_of": "nowhere said", "id": "bad"},
        {"audio": tiny_sound(3, 2.0), "target": "x", "id": "long"},
    ]
    patches, info = tp.edit(model, requests, memory=folder / "memory")
    assert [result.status for result in info.requests] == ["edited", "failed", "failed"]
    assert "which does not say 'nowhere said'" in info.requests[1].reason
    assert "the model reads 1 s" in info.requests[2].reason
    assert tp.attach(model, patches).transcribe(folder / "a.wav") == "in the"
    assert tp.merge(model, patches).transcribe(folder / "a.wav") == "in the"
