"""Trainings as kohya's scripts are told them: a TOML file, a data set's TOML file, or a command line.

A training's TOML holds the script's options by name, in sections that mean nothing; `dataset_config` in it names the
data set's. Defaults are the scripts' (`docs/train_network.md`, `docs/config_README-en.md`), so that what a file leaves
out is written into the recipe where ours differ.
"""

from __future__ import annotations

import math
import re
import shlex
from pathlib import Path, PureWindowsPath
from typing import Any

from sdforge.datasets import folders
from sdforge.errors import UsageError, counted
from sdforge.imports.draft import Draft, Wishes, listed, text_of
from sdforge.pictures import PICTURES

SCRIPTS = {  # script → family, and the training where no option tells it
    "train_network": ("sd15", "lora"),
    "sdxl_train_network": ("sdxl", "lora"),
    "train_textual_inversion": ("sd15", "textual_inversion"),
    "sdxl_train_textual_inversion": ("sdxl", "textual_inversion"),
    "fine_tune": ("sd15", "fine_tune"),
    "sdxl_train": ("sdxl", "fine_tune"),
    "train_db": ("sd15", "dreambooth"),
}
ALGORITHMS = {"lora": "lora", "locon": "lora", "loha": "loha", "lokr": "lokr"}  # of LyCORIS → ours
OPTIMIZERS = {"adamw": "adamw", "adamw8bit": "adamw8bit", "adamwschedulefree": "schedule_free"}
DTYPES = {"fp16": "fp16", "bf16": "bf16", "float": "fp32", "fp32": "fp32"}
PRECISIONS = {"no": "fp32", "bf16": "bf16", "fp16": "bf16"}
HOW = re.compile(  # options that say how to run and what to write on the way, and nothing of what comes out
    r"cache_(latents|text_encoder_outputs)\w*|xformers|sdpa|mem_eff_attn|gradient_checkpointing|lowram|highvram"
    r"|\w*data_loader\w*|vae_batch_size|(output|logging)_dir|log_\w+|wandb_\w+|save_(every|last|state|model|n_epoch)\w*"
    r"|sample_\w+|console_\w+|no_half_vae|huggingface_\w+|metadata_\w+|training_comment|no_metadata|ddp_\w+"
    r"|torch_compile|dynamo_backend|skip_cache_check|resume\w*|config_file|full_path|masked_loss_dir"
    r"|deepspeed|initial_\w+|tokenizer_cache_dir"
)
RATE = 2e-6  # the scripts' default
OFF: tuple[Any, ...] = (None, False, "", 0, 0.0, [])
EPOCHS = "max_train_epochs"


def recognises(path: Path, text: str) -> bool:
    """Say whether a text is an option file, a data set's file or a command line of these scripts."""
    if path.suffix == ".toml":
        return True
    return "--pretrained_model_name_or_path" in text or "--dataset_config" in text


def read(path: Path, text: str, draft: Draft, wishes: Wishes) -> None:
    """Make a training of it, with its data sets. Raises UsageError for trainings that have no counterpart."""
    options, script = (_toml(path, text), "") if path.suffix == ".toml" else _command(path, text)
    if "datasets" in options:
        draft.about = "a data set's configuration of kohya's scripts"
        draft.family = wishes.family or "sd15"
        _Pictures(path, options, {}, draft).add()
        draft.note("it is a data set alone: a training that names it belongs behind it")
        return
    _Training(path, options, script, draft, wishes).add()


def _toml(path: Path, text: str) -> dict[str, Any]:
    """Return the options of a file; sections of a training's are joined."""
    import tomli

    try:
        found = tomli.loads(text)
    except tomli.TOMLDecodeError as error:
        raise UsageError(f"{path} is no TOML: {error}") from None
    if "datasets" in found:
        return found
    joined = {key: value for key, value in found.items() if not isinstance(value, dict)}
    for section in found.values():
        joined |= section if isinstance(section, dict) else {}
    if "pretrained_model_name_or_path" not in joined:
        hint = "a training's names `pretrained_model_name_or_path`, a data set's holds [[datasets]]"
        raise UsageError(f"{path} is no configuration of kohya's scripts", hint)
    return joined


def _command(path: Path, text: str) -> tuple[dict[str, Any], str]:
    """Return the options of a command line, and the script's name; lines may end in a backslash or ^."""
    joined = re.sub(r"[\\^`]\s*\n", " ", text)
    line = next((each for each in joined.splitlines() if "--" in each and not each.lstrip().startswith("#")), "")
    try:
        words = shlex.split(line)
    except ValueError as error:
        raise UsageError(f"{path} holds a command line that is not whole: {error}") from None
    scripts = [PureWindowsPath(word).stem for word in words if word.endswith(".py")]
    start = next((i for i, word in enumerate(words) if word.endswith(".py")), -1) + 1
    options: dict[str, Any] = {}
    key = ""
    for word in words[start:]:
        if word.startswith("--"):
            key, equals, value = word[2:].partition("=")
            options[key] = _typed(value) if equals else True
        elif key:
            before = options[key]
            options[key] = _typed(word) if before is True else [*_several(before), _typed(word)]
    return options, scripts[0] if scripts else ""


def _typed(word: str) -> Any:
    for kind in (int, float):
        try:
            return kind(word)
        except ValueError:
            continue
    return {"true": True, "false": False}.get(word.lower(), word)


def _several(found: Any) -> list[Any]:
    return found if isinstance(found, list) else [] if found is None else [found]


class _Training:
    """One training on its way into a draft."""

    def __init__(self, path: Path, options: dict[str, Any], script: str, draft: Draft, wishes: Wishes) -> None:
        self.path, self.options, self.draft = path, options, draft
        family, method = SCRIPTS.get(script, ("", ""))
        if script and not family:
            raise UsageError(f"{path} runs {script}.py, whose training has no counterpart here")
        v2 = "sd2" if self.take("v2") else ""
        draft.family = wishes.family or v2 or family
        self.steps = 1600  # the scripts' default
        self.network = dict(str(each).partition("=")[::2] for each in _several(self.take("network_args")))
        self.method = self._method(method)
        draft.about = f"a training of kohya's scripts ({self.method})"

    def take(self, name: str, default: Any = None) -> Any:
        """Return an option and count it as read."""
        found = self.options.pop(name, default)
        return default if found is None else found

    def _method(self, of_script: str) -> str:
        """Return the training that the options tell."""
        module = str(self.take("network_module", ""))
        if module == "lycoris.kohya":
            algorithm = self.network.pop("algo", "lora").lower()
            if algorithm not in ALGORITHMS:
                raise UsageError(f"{self.path} trains {algorithm} of LyCORIS, which has no counterpart here")
            return ALGORITHMS[algorithm]
        if module and module != "networks.lora":
            raise UsageError(f"{self.path} trains {module}, which has no counterpart here")
        found = "lora" if module else "textual_inversion" if "token_string" in self.options else of_script
        if not found:
            raise UsageError(
                f"{self.path} does not tell what it trains: neither `network_module` nor `token_string` is in it",
                hint="import the command line that names the script instead",
            )
        return found

    def add(self) -> None:
        """Add the training, what it is trained on, its data sets and the preset."""
        wish = str(self.take("output_name") or self.path.stem)
        prediction = {"prediction": "v_prediction"} if self.take("v_parameterization") else {}
        base = self.draft.source(str(self.take("pretrained_model_name_or_path")), **prediction)
        pictures = _Pictures(self.path, *self._pictures(), self.draft)
        table: dict[str, Any] = {"on": base, **pictures.add()}
        table |= self._kind(pictures) | self._numbers(pictures) | self._optimizer() | self._weighting(pictures)
        table |= self._types()
        clip_skip = int(self.take("clip_skip", 0))
        self._left()
        name = self.draft.target(self.method, wish, table)
        self._preset(base, name, clip_skip)

    def _pictures(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the data set's configuration, and the options that it falls back to."""
        named = self.take("dataset_config")
        shared = {key: self.options.pop(key) for key in _Pictures.OPTIONS if key in self.options}
        folders = {key: self.take(key) for key in ("train_data_dir", "reg_data_dir")}
        if named:
            place = next((p for p in (self.path.parent / str(named), Path(str(named))) if p.is_file()), None)
            if place is None:
                raise UsageError(f"{self.path} names the data set's file {named}, which is not there")
            return _toml(place, text_of(place)), shared
        subsets = [{"image_dir": folders["train_data_dir"], "layout": "kohya"}] if folders["train_data_dir"] else []
        if folders["reg_data_dir"]:
            subsets.append({"image_dir": folders["reg_data_dir"], "layout": "kohya", "is_reg": True})
        return {"datasets": [{"subsets": subsets}]}, shared

    # -- settings ------------------------------------------------------------------------------------------------------

    def _kind(self, pictures: _Pictures) -> dict[str, Any]:
        """Return what this training has and others have not."""
        if self.method == "textual_inversion":
            token = str(self.take("token_string"))
            pictures.trigger(token)
            vectors = int(self.take("num_vectors_per_token", 1))
            return {"token": token, "vectors": vectors, "init": str(self.take("init_word", ""))}
        if self.method in ("fine_tune", "dreambooth"):
            stops = int(self.take("stop_text_encoder_training", 0)) if self.method == "dreambooth" else 0
            trains = self.take("train_text_encoder") if self.method == "fine_tune" else stops >= 0
            if stops > 0:
                self.draft.note(f"the text encoder learned for {stops} steps only; here it does to the end")
            words = {"prompt": pictures.words, "captions": True} if self.method == "dreambooth" else {}
            if self.method == "dreambooth" and not pictures.words:
                raise UsageError(f"{self.path} names no class_tokens, which are the prompt of a DreamBooth training")
            return words | {"text_encoder": bool(trains)}
        return self._network()

    def _network(self) -> dict[str, Any]:
        """Return rank and layers of a LoRA or one of its relatives."""
        rank, alpha = int(self.take("network_dim", 4)), float(self.take("network_alpha", 1))
        found: dict[str, Any] = {"rank": rank, "alpha": alpha}
        if "conv_dim" in self.network:
            found["conv_rank"] = int(self.network.pop("conv_dim"))
            found["conv_alpha"] = float(self.network.pop("conv_alpha", alpha))
        if self.method == "lokr" and "factor" in self.network:
            found["factor"] = int(self.network.pop("factor"))
        if self.method == "lora" and self.network.pop("dora_wd", "").lower() == "true":
            found["dora"] = True
        rates = _several(self.take("text_encoder_lr"))
        only_unet = self.take("network_train_unet_only", False) or (rates and not any(map(float, rates)))
        if len(set(rates)) > 1:
            self.draft.note(f"text_encoder_lr = {rates}: here the text encoders have one rate, the first")
        if self.take("network_train_text_encoder_only"):
            raise UsageError(f"{self.path} trains the text encoder alone, which has no counterpart here")
        rate = float(rates[0]) if rates else float(self.options.get("learning_rate", RATE))
        return found | {"text_encoder": not only_unet} | ({} if only_unet else {"text_learning_rate": rate})

    def _numbers(self, pictures: _Pictures) -> dict[str, Any]:
        """Return steps, batch and rate."""
        batch = pictures.batch * int(self.take("gradient_accumulation_steps", 1))
        steps, epochs = self.take("max_train_steps"), self.take(EPOCHS)
        if epochs and pictures.shown:
            steps = int(epochs) * math.ceil(pictures.shown / batch)
            self.draft.note(
                f"{EPOCHS} = {epochs} is {counted(steps, 'step')}: {pictures.shown} pictures, {batch} a step"
            )
        elif epochs:
            self.draft.note(
                f"{EPOCHS} = {epochs}: its pictures are not here to be counted, so the steps are to be chosen"
            )
        rate = self.take("unet_lr") or self.options.get("learning_rate")
        self.take("learning_rate")
        self.steps = int(steps or self.steps)
        found: dict[str, Any] = {"steps": self.steps, "batch": batch}
        if rate is None or float(rate) < 0.1:
            found["learning_rate"] = float(rate or RATE)
        else:
            self.draft.note(
                f"a learning rate of {rate} is for optimisers that find their own: ours stays at its default"
            )
        return found

    def _optimizer(self) -> dict[str, Any]:
        """Return the optimiser, its schedule and its limits."""
        name = str(self.take("optimizer_type", "AdamW8bit" if self.take("use_8bit_adam") else "AdamW"))
        arguments = dict(str(each).partition("=")[::2] for each in _several(self.take("optimizer_args")))
        if name.lower() not in OPTIMIZERS:
            self.draft.note(f"the optimiser {name} is not here: AdamW")
        kind = OPTIMIZERS.get(name.lower(), "adamw")
        decay = float(arguments.pop("weight_decay", 0.01))
        for key, value in sorted(arguments.items()):
            self.draft.note(f"the optimiser's {key} = {value} is left at its default")
        schedule = str(self.take("lr_scheduler", "constant")).removesuffix("_with_warmup")
        if schedule not in ("constant", "cosine"):
            self.draft.note(f"lr_scheduler = {schedule}: there are constant and cosine, and it is constant")
        if schedule == "cosine":
            self.draft.note("lr_scheduler = cosine falls from the start to 0; here over the second half to 2 %")
        schedule = "cosine" if schedule == "cosine" else "constant"
        warmup = float(self.take("lr_warmup_steps", 0))
        found: dict[str, Any] = {} if kind == "adamw" else {"optimizer": kind}
        found |= {"schedule": schedule, "warmup": int(warmup if warmup >= 1 else warmup * self.steps)}
        return found | {"weight_decay": decay, "clip": float(self.take("max_grad_norm", 1.0))}

    def _weighting(self, pictures: _Pictures) -> dict[str, Any]:
        """Return what weighs losses and changes pictures and captions."""
        found: dict[str, Any] = {"min_snr": float(self.take("min_snr_gamma", 0) or 0)}
        if first := int(self.take("min_timestep", 0)):
            found["noise_from"] = first
        if self.options.get("loss_type") == "l2":  # which is the only one here
            self.take("loss_type")
        found |= {"caption_dropout": float(pictures.option("caption_dropout_rate", 0.0))}
        if offset := float(self.take("noise_offset", 0) or 0):
            found["noise_offset"] = offset
        if pictures.option("flip_aug", False):
            found["flip"] = True
        if pictures.option("shuffle_caption", False):
            found |= {"shuffle": True, "keep_tokens": int(pictures.option("keep_tokens", 0))}
        found |= pictures.shape()
        prior = float(self.take("prior_loss_weight", 1.0))
        return found | ({"prior_weight": prior} if pictures.prior else {})

    def _types(self) -> dict[str, Any]:
        """Return the seed and the types of numbers."""
        mixed = str(self.take("mixed_precision", "no"))
        if mixed == "fp16":
            self.draft.note("mixed_precision = fp16: what is frozen computes in bf16, which has the range of fp32")
        saved = str(self.take("save_precision", "float"))
        found = {"dtype": DTYPES.get(saved, "fp32"), "precision": PRECISIONS.get(mixed, "bf16")}
        seed = self.take("seed")
        return found | ({} if seed is None else {"seed": int(seed)})

    def _left(self) -> None:
        """Note every option that nobody has read."""
        how = sorted(key for key in self.options if HOW.fullmatch(key))
        if how:
            self.draft.note(f"these say how to run, not what comes out, and are no part of a recipe: {', '.join(how)}")
        for key, value in sorted(self.options.items()):
            if key not in how and value not in OFF:
                self.draft.note(f"{key} = {value} has no counterpart here, and is left out")
        for key, value in sorted(self.network.items()):
            self.draft.note(f"network_args: {key} = {value} has no counterpart here, and is left out")

    def _preset(self, base: str, name: str, clip_skip: int) -> None:
        """Add a preset that writes what was trained as a file of its own."""
        if self.method in ("fine_tune", "dreambooth"):
            self.draft.preset = {"checkpoint": name}
        elif self.method == "textual_inversion":
            self.draft.preset = {"checkpoint": base, "insert": [name], "export": ["embeddings"]}
        else:
            self.draft.preset = {"checkpoint": base, "bake": {name: 1.0}, "export": ["loras"]}
        if clip_skip > 1:
            self.draft.preset["clip_skip"] = clip_skip - 1
            self.draft.note(
                f"clip_skip = {clip_skip}: the preset leaves out {clip_skip - 1} of the layers, the training none"
            )


class _Pictures:
    """The data sets of a configuration: [general], [[datasets]] and their subsets, the nearest word counting."""

    READ = (
        "resolution",
        "enable_bucket",
        "shuffle_caption",
        "keep_tokens",
        "caption_extension",
        "caption_dropout_rate",
        "flip_aug",
        "train_batch_size",
        "dataset_repeats",
    )
    OPTIONS = (
        *READ,
        "bucket_no_upscale",
        "min_bucket_reso",
        "max_bucket_reso",
        "bucket_reso_steps",
        "caption_prefix",
        "caption_suffix",
        "color_aug",
        "random_crop",
        "caption_tag_dropout_rate",
    )
    TAKEN = (*READ, "batch_size", "image_dir", "num_repeats", "class_tokens", "is_reg", "layout", "subsets")

    def __init__(self, path: Path, config: dict[str, Any], shared: dict[str, Any], draft: Draft) -> None:
        self.path, self.draft = path, draft
        general = shared | config.get("general", {})
        datasets = config.get("datasets", [])
        rows = [general | each | subset for each in datasets for subset in each.get("subsets", [])]
        self.subjects = [row for row in rows if not row.get("is_reg")]
        self.classes = [row for row in rows if row.get("is_reg")]
        if not self.subjects:
            raise UsageError(f"{path} names no pictures", hint="dataset_config or train_data_dir names them")
        self.first = self.subjects[0]
        self.batch = int(self.first.get("batch_size") or self.first.get("train_batch_size") or 1)
        self.words = str(self.first.get("class_tokens", ""))
        self.prior = ""
        self.shown = self._count()
        self.name = ""

    def option(self, name: str, default: Any) -> Any:
        """Return what holds for the first subset; say where others have another value."""
        found = self.first.get(name, default)
        if others := {str(row.get(name, default)) for row in self.subjects} - {str(found)}:
            self.draft.note(
                f"{name} is {found} for the first pictures and {listed(sorted(others))} for others: {found}"
            )
        return found

    def add(self) -> dict[str, Any]:
        """Add the data sets; return the settings that name them."""
        self.name = self._dataset(self.first)
        if self.classes:
            self.prior = self._dataset(self.classes[0])
            self.draft.note("pictures of the class have a loss of their own in every step, and no share of the batch")
        for row in [*self.subjects[1:], *self.classes[1:]]:
            self._dataset(row)
            self.draft.note(
                f"a training has one data set, so {row.get('image_dir')} is declared and not used: "
                'folders N_WORDS beside each other in one folder are one data set with layout = "kohya"'
            )
        for name in sorted({key for row in [*self.subjects, *self.classes] for key in row} - set(self.TAKEN)):
            value = next(row[name] for row in [*self.subjects, *self.classes] if name in row)
            if value not in OFF:
                self.draft.note(f"{name} = {value} has no counterpart here, and is left out")
        return {"dataset": self.name} | ({"prior": self.prior} if self.prior else {})

    def _dataset(self, row: dict[str, Any]) -> str:
        """Declare the folder of a subset; return the data set's name."""
        folder = str(row.get("image_dir") or "")
        if not folder:
            raise UsageError(f"{self.path}: a data set names no image_dir", hint="metadata_file alone is not read")
        name = self.draft.name(re.sub(r"^\d+_", "", PureWindowsPath(folder).name))
        path = self.draft.within(folder)
        if not path:
            path = f"data/{name}"
            self.draft.note(f"the pictures of {folder} belong into {path}, within the project")
        ending = str(row.get("caption_extension", ".caption")).removeprefix(".")
        if ending not in ("txt", "caption"):
            self.draft.note(f"captions in .{ending} files are not read: .txt or .caption")
        captions = "caption" if ending == "caption" else "txt"
        table: dict[str, Any] = {"path": path, "captions": captions}
        table |= {"layout": "kohya"} if row.get("layout") else {}
        table |= {"caption": str(row["class_tokens"])} if row.get("class_tokens") else {}
        repeats = int(row.get("num_repeats") or row.get("dataset_repeats") or 1)
        self.draft.datasets[name] = table | ({"repeats": repeats} if repeats > 1 else {})
        return name

    def trigger(self, token: str) -> None:
        """Let the data set name a word that is trained."""
        self.draft.datasets[self.name]["trigger"] = token

    def shape(self) -> dict[str, Any]:
        """Return resolution and buckets."""
        found: dict[str, Any] = {"buckets": bool(self.option("enable_bucket", False))}
        edges = self.option("resolution", 512)
        edges = [int(each) for each in (edges.split(",") if isinstance(edges, str) else _several(edges))]
        edge = edges[0] if len(set(edges)) == 1 else round(math.sqrt(math.prod(edges)) / 64) * 64
        if edge % 64 or len(set(edges)) > 1:
            edge = round(edge / 64) * 64
            self.draft.note(f"resolution = {edges}: a square of {edge} pixels, near in area, in steps of 64")
        return found | {"resolution": edge}

    def _count(self) -> int:
        """Return how many pictures of the first subset a round shows, if they are here."""
        folder = self.draft.root / self.draft.within(str(self.first.get("image_dir") or ""))
        if folder == self.draft.root or not folder.is_dir():
            return 0
        if self.first.get("layout"):
            return sum(repeats * _pictures_in(each) for each, repeats, _ in folders("kohya", folder, 1))
        return _pictures_in(folder) * int(self.first.get("num_repeats") or self.first.get("dataset_repeats") or 1)


def _pictures_in(folder: Path) -> int:
    return sum(path.suffix.lower() in PICTURES for path in folder.iterdir())
