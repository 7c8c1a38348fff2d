"""The tables of recipes and `forge.toml` that are no targets: sources, data sets, the preset, and how to run."""

from __future__ import annotations

from typing import Annotated, Literal, final

from pydantic import ConfigDict, Field
from pydantic.json_schema import SkipJsonSchema

from sdforge.datasets import MOST_REPEATS
from sdforge.edits.export import Form
from sdforge.edits.previews import Drawing
from sdforge.names import DIGEST
from sdforge.places import DEVICE, VRAM
from sdforge.settings import Reference, Table, Weight

Digest = Annotated[str, Field(pattern=DIGEST)]
Template = Annotated[str, Field(min_length=1, max_length=1000)]


@final
class Source(Table):
    """A file or folder that nobody makes. What it states of itself overrides what the file says."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, populate_by_name=True)

    from_: str = Field(
        alias="from",
        min_length=1,
        max_length=1024,
        description="a path within the project, or the name of a file in the folders of forge.local.toml; "
        "hf://ORG/REPO@REVISION/FILE, https://…, a page of civitai.com or an AIR, which `forge fetch` gets",
    )
    sha256: Digest | SkipJsonSchema[None] = Field(None, description="of the file; it is then this file or none")
    licence: str = Field("", description="reaches metadata and card of what is made from it")
    trigger: list[str] = Field([], description="words that call what it knows")
    prediction: Literal["", "epsilon", "v_prediction"] = Field("", description="what the U-Net predicts")
    use_ema: bool = Field(
        False, description="take the averaged copy of the U-Net (EMA) that a single file holds beside it"
    )
    guidance_free: bool = Field(False, description="whether it was distilled to be drawn from without guidance")
    pickle: Literal["refuse", "allow"] = Field(
        "refuse",
        description="allow: .ckpt, .pt and .bin are converted once, in a limited process that runs nothing of them",
    )
    embedding: str = Field(
        "",
        max_length=64,
        description="take only the embedding of this name: from a LoRA's file that carries some, or from the pixels "
        "of a picture",
    )


@final
class Dataset(Table):
    """A folder of pictures with captions."""

    path: str = Field(min_length=1, max_length=1024, description="a folder within the project")
    layout: Literal["flat", "kohya"] = Field(
        "flat",
        description="kohya: folders called N_WORDS, whose pictures are shown N times, with WORDS where they have no "
        "caption",
    )
    captions: Literal["txt", "caption", "none"] = Field(
        "txt", description="txt, caption: the ending of a text file of the same name beside each picture"
    )
    caption: str = Field("", max_length=1000, description="for pictures without one; {trigger} is replaced")
    templates: list[Template] = Field(
        [], max_length=100, description="captions for pictures without one: each picture is shown with each of them"
    )
    trigger: str = Field("", max_length=64, description="what {trigger} in captions stands for")
    repeats: int = Field(1, ge=1, le=MOST_REPEATS, description="how often each picture is shown in a round")
    validation: int = Field(0, ge=0, le=10_000, description="pictures held out, chosen by content")
    licence: str = Field("", description="reaches the card of what is made from it")
    masks: Literal["none", "alpha", "file"] = Field(
        "none",
        description="what of a picture counts: all; where it is opaque; where NAME.mask.png beside it is white",
    )


@final
class PresetPreviews(Drawing):
    """How the preset's previews are drawn; negative prompt and clip skip are the preset's unless stated."""


@final
class Preset(Table):
    """The end of a recipe: what is exported for people to use. Order: insert, bake, sidecars."""

    checkpoint: Reference = Field(description="what the preset is made from")
    insert: list[Reference] = Field([], description="embeddings that become words")
    bake: dict[Reference, Weight] = Field({}, description="what becomes part of the weights → strength")
    sidecars: list[Reference] = Field(
        [], description="what no weights can hold: hypernetworks, image embeddings, null-text inversions, aesthetics"
    )
    dtype: Literal["", "fp16", "bf16", "fp32"] = Field("", description="type of the numbers; empty: as they are")
    export: list[Form] = Field(["checkpoint"], description="the files that are written")
    clip_skip: int = Field(0, ge=0, le=11, description="layers of the text encoder that are left out at the end")
    negative_prompt: str = Field("", description="what is steered away from")
    title: str = Field("", description="for metadata; empty: the recipe's name")
    description: str = Field("", description="for metadata")
    licence: str = Field("", description="for metadata")
    trigger: list[str] = Field([], description="for metadata: words that call what was trained")
    previews: PresetPreviews = Field(default_factory=PresetPreviews)


@final
class States(Table):
    """How often the state of a training is kept; that of `extract` and `resize` goes by time alone."""

    steps: int = Field(0, ge=0, description="every so many steps; 0: only by time")
    minutes: float = Field(1.0, gt=0, le=1440, description="at the latest after so many minutes")


@final
class SampleRun(Table):
    """Pictures that are drawn while a training runs."""

    steps: int = Field(0, ge=0, description="every so many steps; 0: none")
    prompts: list[str] = Field([], max_length=8, description="what is drawn; empty: two captions of the data set")
    seed: int = Field(1, ge=0, lt=2**53, description="of the noise they are drawn from")


@final
class Run(Table):
    """How to run: never what comes out."""

    device: str = Field(
        "auto", pattern=DEVICE, description="where trainings run; large merges choose numbers there too"
    )
    jobs: int = Field(1, ge=1, le=64, description="actions side by side")
    threads: int = Field(1, ge=1, le=256, description="CPU threads of a training; recorded with its result")
    vram: str = Field(
        "", pattern=VRAM, description='what a training may use of the device\'s memory, as "8GB"; empty: all there is'
    )
    states: States = Field(default_factory=States)
    samples: SampleRun = Field(default_factory=SampleRun)
    tensorboard: str = Field("", max_length=1024, description="a folder for TensorBoard's events; empty: none")


@final
class Cache(Table):
    """What this project's cache may hold."""

    max_size: str = Field(
        "",
        pattern=VRAM,
        description='as "50GB": above it, what can be made again is removed after a build; trained results stay. '
        "Empty: no bound",
    )


@final
class Remote(Table):
    """A cache that machines share: where trained results are had from, and put."""

    address: str = Field("", max_length=1024, description="a folder, https://…, s3://…, gs://…, az://…; empty: none")
    mode: Literal["read", "write", "off"] = Field(
        "read", description="read: what the lock pins is had from there; write: a build also puts there what it trained"
    )


Gpus = Annotated[int, Field(ge=0, le=64)]
Cpus = Annotated[int, Field(ge=1, le=256)]
Memory = Annotated[str, Field(pattern=VRAM)]
Minutes = Annotated[int, Field(ge=1, le=100_000)]
Partition = Annotated[str, Field(max_length=256)]


class Asked(Table):
    """What a job asks for, where it is stated; else it follows from the action."""

    gpus: Gpus | SkipJsonSchema[None] = Field(
        None, description="default: 1 of what computes on a device, unless that is the CPU; 0 of all else"
    )
    cpus: Cpus | SkipJsonSchema[None] = Field(
        None, description="default: 4 beside a GPU, 3 of a formula, else as many as `threads` of [run]"
    )
    memory: Memory | SkipJsonSchema[None] = Field(
        None, description='as "32GB"; empty: what the engine gives; default: by the size of what it reads and learns'
    )
    minutes: Minutes | SkipJsonSchema[None] = Field(
        None, description="after which Slurm may end it (Ray does not); default: 1440"
    )
    partition: Partition | SkipJsonSchema[None] = Field(
        None, description="of Slurm; default: the one of `--on slurm:PARTITION`, or Slurm's own"
    )


@final
class Job(Asked):
    """What the jobs of a kind, a method or a target ask for; it goes before what [cluster] says of all."""

    here: bool | SkipJsonSchema[None] = Field(
        None, description="as no job, but on the machine of the build; default: true of formulas, false of all else"
    )


@final
class Cluster(Asked):
    """What jobs of `forge build --on` ask for: never what comes out.

    What is stated of a target goes first, then of its method, then of its kind, then of all; `gpus` of all is for what
    computes on a device.
    """

    trainings: Job = Field(default_factory=Job, description="all that trains")
    pictures: Job = Field(default_factory=Job, description="previews")
    formulas: Job = Field(default_factory=Job, description="merges, bakes and other edits that are formulas")
    edits: Job = Field(default_factory=Job, description="edits that are none: extract, resize, custom_merge")
    checks: Job = Field(default_factory=Job, description="checks that ask a network")
    methods: dict[str, Job] = Field({}, max_length=1000, description="a method's name → its jobs")
    targets: dict[str, Job] = Field({}, max_length=10_000, description='"RECIPE:TARGET" → its job')


@final
class Consent(Table):
    """What of other people's recipes may run here."""

    commands: list[list[str]] = Field(
        [],
        max_length=100,
        description="commands of checks that may run here, word by word as the recipe has them; no others do",
    )


@final
class Trust(Table):
    """Whose signatures are believed."""

    keys: list[str] = Field([], max_length=100, description="public keys, as in id_ed25519.pub: ssh-ed25519 AAAA… NAME")


@final
class ForgeToml(Table):
    """`forge.toml`: the project."""

    default: list[str] = Field([], description="the recipes that `forge build` alone builds")
    source: dict[str, Source] = Field({})
    dataset: dict[str, Dataset] = Field({})
    remote: Remote = Field(default_factory=Remote)
    trust: Trust = Field(default_factory=Trust)
    cluster: Cluster = Field(default_factory=Cluster)
    run: Run = Field(default_factory=Run)
    cache: Cache = Field(default_factory=Cache)


@final
class ForgeLocalToml(Table):
    """`forge.local.toml`: this machine; not in git."""

    folders: list[str] = Field([], description="where sources lie that are not in the project, by name or sha256")
    remote: Remote = Field(default_factory=Remote)
    trust: Trust = Field(default_factory=Trust)
    cluster: Cluster = Field(default_factory=Cluster)
    run: Run = Field(default_factory=Run)
    cache: Cache = Field(default_factory=Cache)
    checks: Consent = Field(default_factory=Consent)
