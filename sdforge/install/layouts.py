"""Where programs look for the files of a preset: facts of other people's programs, all in this one place.

Read in ComfyUI's `folder_paths.py` and its example of paths for A1111, A1111's page of extra networks, Forge's options
(`modules/cmd_args.py`), SD.Next's `modules/paths.py`, which has no hypernetworks any more, and InvokeAI's
documentation: before version 4 it looked through its folder `autoimport` by itself, since then "Scan Folder" does.
What each reads stands in its own code, which was run of ComfyUI and InvokeAI (`benchmarks.programs`, docs/programs.md).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Layout:
    """A program's folders.

    title: as its authors write it. marks: what an installation has below PATH. folders: kind of artifact → the folder
    below PATH in which it is looked for. endings: kind → how the names of files end that it reads, the best first.
    whole: the folder for diffusers folders; empty: it reads none. grown: whether it reads one whose table of words was
    appended to. sidecars: whether it shows pictures and texts that lie beside a file. word: what calls an embedding in
    a prompt; {name} is the file's name without its ending. after: what is left to do there.
    takes: family → what it takes every single file of it to predict, whatever that states; those that it tells apart
    are left out. set_right: the way out where that is wrong; {name} as above, {prediction} what the file predicts.
    """

    title: str
    marks: tuple[str, ...]
    folders: dict[str, str]
    endings: dict[str, tuple[str, ...]]
    whole: str
    grown: bool
    sidecars: bool
    word: str
    after: str
    takes: dict[str, str]
    set_right: str


PLAIN, PICKLE = ".safetensors", ".pt"
READS = {
    "checkpoint": (PLAIN,),
    "lora": (PLAIN,),
    "embedding": (PLAIN, PICKLE),
    "hypernetwork": (PICKLE,),
}
A1111 = Layout(
    title="AUTOMATIC1111's web UI",
    marks=("models/Stable-diffusion", "embeddings"),
    folders={
        "checkpoint": "models/Stable-diffusion",
        "lora": "models/Lora",
        "embedding": "embeddings",
        "hypernetwork": "models/hypernetworks",
    },
    endings=READS,
    whole="",
    grown=False,
    sidecars=True,
    word="{name}",
    after="press the refresh button beside the list of checkpoints",
    takes={"sd15": "epsilon"},
    set_right="put a configuration of its family with `parameterization: v` beside it, as {name}.yaml",
)
LAYOUTS = {
    "comfyui": Layout(
        title="ComfyUI",
        marks=("models/checkpoints",),
        folders={
            "checkpoint": "models/checkpoints",
            "lora": "models/loras",
            "embedding": "models/embeddings",
            "hypernetwork": "models/hypernetworks",
        },
        endings=READS,
        whole="models/diffusers",
        grown=False,
        sidecars=True,
        word="embedding:{name}",
        after="press R there, and its lists are read anew",
        takes={"sd15": "epsilon"},
        set_right="the node ModelSamplingDiscrete with {prediction} belongs behind its loader",
    ),
    "a1111": A1111,
    "forge": Layout(
        **vars(A1111)
        | {
            "title": "Stable Diffusion WebUI Forge",
            # it lists hypernetworks, and nothing in it uses one any more
            "folders": {kind: folder for kind, folder in A1111.folders.items() if kind != "hypernetwork"},
            "endings": {kind: endings for kind, endings in READS.items() if kind != "hypernetwork"},
            "takes": {"sd15": "epsilon", "sd2": "epsilon"},
            "set_right": "`model: {{params: {{parameterization: v}}}}` has to stand beside it, as {name}.yaml",
        }
    ),
    "sdnext": Layout(
        title="SD.Next",
        marks=("models/Stable-diffusion", "models/embeddings"),
        folders={
            "checkpoint": "models/Stable-diffusion",
            "lora": "models/Lora",
            "embedding": "models/embeddings",
        },
        endings={"checkpoint": (PLAIN,), "lora": (PLAIN,), "embedding": (PLAIN, PICKLE)},
        whole="models/Diffusers",
        grown=True,
        sidecars=True,
        word="{name}",
        after="press the refresh button beside the list of models",
        takes={"sd2": "v_prediction"},  # unless it is marked as v: diffusers takes 2.x for 768-v
        set_right="choose {prediction} as the prediction method of its sampler",
    ),
    "invokeai": Layout(
        title="InvokeAI",
        marks=("invokeai.yaml",),
        folders={
            "checkpoint": "autoimport/main",
            "lora": "autoimport/lora",
            "embedding": "autoimport/embedding",
        },
        endings={"checkpoint": (PLAIN,), "lora": (PLAIN,), "embedding": (PLAIN, PICKLE)},
        whole="autoimport/main",
        grown=True,
        sidecars=False,
        word="<{name}>",
        after="in its model manager choose Scan Folder, name the folder autoimport, and install what it finds in place",
        takes={"sd15": "epsilon", "sd2": "v_prediction", "sdxl": "epsilon"},
        set_right="choose {prediction} as its prediction type in the model manager",
    ),
}
