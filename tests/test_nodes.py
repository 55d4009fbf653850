"""Names and messages of nodes, against the classes of a real ComfyUI and against names as custom nodes have them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from managers.comfyui.nodes import Category, category, message, node_name, split_words, weight
from managers.comfyui.object_info import decode_object_info

DATA = Path(__file__).parent / "data"
INFO = decode_object_info((DATA / "object_info.json").read_bytes())


@pytest.mark.parametrize(
    ("class_type", "title", "display_name", "name"),
    [
        ("KSampler", None, None, "K-Sampler"),
        ("KSampler", "KSampler", "KSampler", "K-Sampler"),  # the title that the editor writes by itself
        ("KSampler", "Second pass", "KSampler", "Second pass"),
        ("CheckpointLoaderSimple", "Load Checkpoint", "Load Checkpoint", "Load checkpoint"),
        ("SaveImage", None, "Save Image", "Save Image"),
        ("EmptyImage", None, "EmptyImage", "Empty Image"),
        ("FancyThing_v2", None, None, "Fancy Thing v2"),
        ("FancyThing", "", "🌟 Fancy", "🌟 Fancy"),
        ("unCLIPConditioning", None, None, "un CLIP Conditioning"),
        ("VAEDecodeHunyuan3D", None, None, "VAE Decode Hunyuan 3D"),
        ("SetUnionControlNetType", None, None, "Set Union ControlNet Type"),
        ("🌟", None, None, "🌟"),
    ],
)
def test_names(class_type: str, title: str | None, display_name: str | None, name: str) -> None:
    assert node_name(class_type, title, display_name) == name


@pytest.mark.parametrize(
    ("class_type", "step", "steps", "text"),
    [
        ("KSampler", 15, 20, "Generating image using K-Sampler: 15/20 steps (75%)"),
        ("KSampler", 15.0, 20.0, "Generating image using K-Sampler: 15/20 steps (75%)"),
        ("KSampler", 0, 20, "Generating image using K-Sampler: 0/20 steps (0%)"),
        ("KSampler", 25, 20, "Generating image using K-Sampler: 20/20 steps (100%)"),
        ("KSampler", 199, 200, "Generating image using K-Sampler: 199/200 steps (99%)"),
        ("KSampler", None, None, "Generating image using K-Sampler…"),
        ("SamplerCustomAdvanced", 1, 4, "Generating image using Custom sampler (advanced): 1/4 steps (25%)"),
        ("KSampler", float("nan"), 20, "Generating image using K-Sampler…"),
        ("KSampler", 1, float("inf"), "Generating image using K-Sampler…"),
        ("CheckpointLoaderSimple", None, None, "Loading checkpoint…"),
        ("CheckpointLoaderSimple", 0, 1, "Loading checkpoint…"),
        ("UNETLoader", None, None, "Loading diffusion model…"),
        ("LoraLoader", None, None, "Loading LoRA…"),
        ("VAELoader", None, None, "Loading VAE…"),
        ("CLIPVisionLoader", None, None, "Loading CLIP vision model…"),
        ("PhotoMakerLoader", None, None, "Loading model…"),
        ("LoadImage", None, None, "Loading image…"),
        ("LoadAudio", None, None, "Loading audio…"),
        ("VHS_LoadVideo", None, None, "Loading video…"),
        ("CLIPTextEncodeFlux", None, None, "Encoding text prompt…"),
        ("VAEEncode", None, None, "Encoding image…"),
        ("VAEDecode", None, None, "Decoding image…"),
        ("VAEDecodeAudio", None, None, "Decoding audio…"),
        ("SaveImage", None, None, "Saving image…"),
        ("SaveWEBM", None, None, "Saving video…"),
        ("SaveAudioMP3", None, None, "Saving audio…"),
        ("PreviewImage", None, None, "Preparing image preview…"),
        ("ImageUpscaleWithModel", 2, 8, "Upscaling image: 2/8 (25%)"),
        ("ControlNetApplyAdvanced", None, None, "Applying ControlNet…"),
        ("SleepSteps", 3, 10, "Running Sleep Steps: 3/10 (30%)"),
        ("ImageInvert", None, None, "Running Image Invert…"),
    ],
)
def test_messages(class_type: str, step: float | None, steps: float | None, text: str) -> None:
    assert message(class_type, node_name(class_type), step, steps) == text


@pytest.mark.parametrize(
    ("kind", "class_types"),
    [
        ("sampler", ["KSamplerAdvanced", "SamplerCustom", "WanVideoSampler", "UltimateSDUpscale", "FaceDetailer"]),
        ("other", ["KSamplerSelect", "SamplerLMS", "BasicScheduler", "EmptySD3LatentImage", "ModelSamplingFlux"]),
        ("loader", ["DualCLIPLoader", "UpscaleModelLoader", "UnetLoaderGGUF", "DownloadAndLoadFlorence2ModelLoader"]),
        ("load", ["LoadImageMask", "Load3D", "RecordAudio"]),
        ("encode", ["TextEncodeQwenImageEdit", "VAEEncodeForInpaint", "CLIPVisionEncode"]),
        ("decode", ["VAEDecodeTiled", "LTXVAudioVAEDecode"]),
        ("save", ["SaveVideo", "VHS_VideoCombine", "CheckpointSave", "PreviewAny", "MaskPreview"]),
        ("upscale", ["ImageUpscaleWithModel", "RIFE VFI", "SUPIR_Upscale"]),
        ("control", ["ControlNetApplySD3", "IPAdapterAdvanced", "DWPreprocessor", "Canny"]),
    ],
)
def test_categories(kind: Category, class_types: list[str]) -> None:
    assert {class_type: category(class_type) for class_type in class_types} == dict.fromkeys(class_types, kind)


def test_weights_are_in_proportion() -> None:
    assert weight("KSampler") > weight("CheckpointLoaderSimple") > weight("VAEDecode") > weight("CLIPTextEncode")
    assert weight("CLIPTextEncode") > weight("LoadImage") > weight("EmptyLatentImage") > 0
    # A long chain of small things does not outweigh the sampler.
    assert weight("KSampler") > 100 * weight("PrimitiveInt")


def test_output_nodes_are_what_saves() -> None:
    outputs = {name for name, found in INFO.items() if found.output_node}
    saves = {name for name in INFO if category(name) == "save"}
    # Two of the recordings' own nodes: one gives text, one is no output.
    assert outputs ^ saves == {"ProbeText", "PreviewFlood"}


def test_titles_of_a_workflow_as_the_editor_writes_them_do_not_hide_our_words() -> None:
    for class_type, found in json.loads((DATA / "object_info.json").read_text()).items():
        default_title = found["display_name"]
        assert node_name(class_type, default_title, default_title) == node_name(class_type, None, default_title)


@given(
    st.text(min_size=1),
    st.none() | st.text(),
    st.none() | st.text(),
    st.none() | st.floats(),
    st.none() | st.floats(),
)
def test_anything_gets_words(
    class_type: str, title: str | None, display_name: str | None, step: float | None, steps: float | None
) -> None:
    name = node_name(class_type, title, display_name)
    assert name
    assert split_words(class_type)
    assert message(class_type, name, step, steps)
    assert weight(class_type) > 0
