"""What a tune file may say: methods, averages and everything else, with their types, limits and defaults."""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]


def _map(properties: dict[str, Schema], required: list[str] | None = None) -> Schema:
    return {"type": "object", "additionalProperties": False, "properties": properties, "required": required or []}


def _number(about: str, *, default: Any = None, above: float | None = None, low: float | None = None, high: float | None = None,
            below: float | None = None) -> Schema:  # fmt: skip
    made: Schema = {"type": "number", "description": about}
    limits = {"exclusiveMinimum": above, "minimum": low, "maximum": high, "exclusiveMaximum": below, "default": default}
    return made | {k: v for k, v in limits.items() if v is not None}


def _count(about: str, *, default: int | None = None, low: int = 1) -> Schema:
    made: Schema = {"type": "integer", "minimum": low, "description": about}
    return made if default is None else made | {"default": default}


_DENSITY = _number("Share of the entries that are trained.", default=0.05, above=0, high=1)

METHODS: dict[str, Schema] = {
    "full": {"const": None, "description": "Every tensor."},
    "lora": {
        "type": "object",
        "description": "An adapter by peft; keys are its config's, and peft_type for others than LORA.",
        "properties": {
            "calibration": {"type": "string", "description": "What corda and eva start from; default: what is trained on."},
            "calibration_examples": _count("How many of it at most; default 256."),
        },
    },
    "head": {"const": None, "description": "What comes after the model proper: the classifier, the language model's head."},
    "last": _count("The last k blocks, and what comes after them."),
    "frozen": _count("Everything but the embeddings and the first k blocks."),
    "bitfit": {"const": None, "description": "Biases, and a new head."},
    "half": _map({"seed": {"type": "integer", "description": "Of the draw; default: `seed`."}}),
    "lt_sft": _map(
        {
            "density": _DENSITY,
            "epochs": _number("Of the first, full run that chooses the entries; default: `epochs`.", above=0),
            "norms": {"type": "boolean", "default": False, "description": "Let norms be trained as well."},
        }
    ),
    "lift": _map(
        {
            "rank": _count("Of the approximation whose largest entries are trained.", default=32),
            "density": _DENSITY,
            "budget": _count("Instead of density: as many entries of a matrix as LoRA of this rank has numbers."),
            "every": _count("Steps between new choices.", default=200),
        }
    ),
    "diff_pruning": _map(
        {
            "density": _number("Share of the entries that is left.", default=0.005, above=0, high=1),
            "penalty": _number("On open gates; divided by the number of entries.", default=42.0, low=0),
            "gate_lr": _number("Learning rate of the gates, constant.", default=0.1, above=0),
            "groups": {"type": "boolean", "default": True, "description": "A gate for each tensor as well."},
            "epochs": _number("Of the first run, with gates; default: `epochs`.", above=0),
        }
    ),
    "columns": _map(
        {
            "statistics": {"type": "string", "description": "Gram matrices: what `surgery statistics --kind gram` wrote."},
            "count": _count("Weak columns of every matrix; overrides share."),
            "share": _number("Share of the columns that is weak.", default=0.03, above=0, high=1),
            "choice": {
                "enum": ["inputs", "error", "random"],
                "default": "inputs",
                "description": "By the inputs' sizes; these times the columns' rounding errors; or drawn, to compare.",
            },
            "seed": {"type": "integer", "description": "Of a random choice; default: `seed`."},
        }
    ),
    "random": _map({"density": _DENSITY, "seed": {"type": "integer", "description": "Of the draw; default: `seed`."}}),
    "sara": _map(
        {
            "threshold": _number("Entries smaller than this are trained.", default=1e-3, above=0),
            "narrow": _number("Share of the run after which entries above the threshold are frozen.", above=0, below=1),
            "nuclear": _number("On the nuclear norm of what training changes, of one matrix in each step.", default=0.0, low=0),
        }
    ),
    "spt": _map(
        {
            "density": _DENSITY,
            "batches": _count("Batches that squared gradients are summed over.", default=16),
            "structured": _map(
                {
                    "rank": _count("Of the low-rank change of a matrix with many sensitive entries."),
                    "alpha": _number("Many: rank (m + n) over this.", default=5.0, above=0),
                    "beta": _number("Vectors are trained whole from their size over this.", default=5.0, above=0),
                    "scale": _number("Factor of the low-rank change.", default=1.0, above=0),
                },
                ["rank"],
            )
            | {"description": "Low-rank changes where many entries are sensitive, vectors whole; without it entries alone."},
        }
    ),
}

AVERAGES: dict[str, Schema] = {
    "ema": _map(
        {
            "decay": _number("Weight of the average in each step.", default=0.999, low=0, below=1),
            "debias": {"type": "boolean", "default": False, "description": "Leave the base out of the average."},
        }
    ),
    "swa": _map(
        {
            "start": _number("Share of the training after which averaging starts.", default=0.5, low=0, below=1),
            "every": _count("Steps between two states; default: the ends of epochs."),
        }
    ),
    "stock": _map({"runs": _count("Models trained side by side, merged after every epoch.", default=2, low=2)}),
    "elastic": _map(
        {
            "decay": _number("Of the moving average.", default=0.995, low=0, below=1),
            "every": _count("Steps between resets.", default=260),
            "reset_optimizer": {"type": "boolean", "default": True, "description": "Drop the optimizer's moments with it."},
        }
    ),
}

REGULARISE: Schema = _map(
    {
        "l2_sp": _number("Pull towards the base: adds this times the squared distance to the loss.", low=0),
        "mixout": _number("Chance that a weight is the base's own in a step.", low=0, below=1),
        "neftune": _number("Noise on the embeddings: alpha.", above=0),
        "label_smoothing": _number("Share of the label that is spread over all classes.", low=0, below=1),
        "clip": _number("Norm that the gradient of all tensors together is clipped to; 0: never.", default=1.0, low=0),
        "clip_each": _number("Norm that the gradient of each tensor is clipped to, instead.", above=0),
    }
)

FAST_FORWARD: Schema = _map(
    {
        "every": _count("Updates between two attempts.", default=6),
        "examples": _count("Validation examples whose loss must fall.", default=32),
        "most": _count("Repetitions of an update at most.", default=100),
    }
)

THROUGH: Schema = _map(
    {
        "codec": {"enum": ["hadamard", "group", "quantile"], "description": "A lossy codec of packages."},
        "bits": _count("Bits of a number.", default=4),
        "of": {
            "enum": ["weights", "delta", "adapter", "base"],
            "default": "weights",
            "description": "What is rounded: matrices, their change, an adapter's factors, or the base below an adapter.",
        },
        "trust": {"type": "boolean", "description": "No gradient where a number lies beyond the grid; default: for hadamard."},
        "learned": {"type": "boolean", "default": False, "description": "Train the steps of the grid as well."},
        "step_lr": _number("Of learned steps, relative to their size; default: a tenth of `lr`.", above=0),
        "group": _count("Of codec group: numbers that share a step."),
        "scale": {"enum": ["gain", "l2"], "description": "Of codecs group and hadamard; default l2, the least squared error."},
        "signs": {"type": "boolean", "description": "Of codec hadamard: random signs before the turn; default: none."},
        "criterion": {"enum": ["mse", "l1"], "description": "Of codec quantile: what its levels minimise."},
    },
    ["codec"],
)

DISTIL: Schema = _map(
    {
        "share": _number("Of the loss; the rest is the task's.", default=1.0, above=0, high=1),
        "temperature": _number("That both outputs are softened by.", default=1.0, above=0),
    }
)

_TRAIN: Schema = {
    "anyOf": [{"type": "string"}, {"type": "array", "minItems": 2, "items": {"type": "string"}}],
    "description": "A file; or several, which are a stream of tasks, trained on one after the other.",
}

TASKS: dict[str, Schema] = {
    "classification": _map(
        {
            "kind": {"const": "classification"},
            "train": _TRAIN,
            "validation": {"type": "string"},
            "text": {"type": "string", "default": "text", "description": "Column of the text."},
            "pair": {"type": "string", "description": "Column of a second text."},
            "label": {"type": "string", "default": "label", "description": "Column of the label."},
            "length": _count("Tokens that a text is cut to."),
        },
        ["kind", "train"],
    ),
    "causal": _map(
        {
            "kind": {"const": "causal"},
            "train": _TRAIN,
            "validation": {"type": "string"},
            "completion_only": {"type": "boolean", "default": False, "description": "No loss on the prompt."},
            "length": _count("Tokens of an example."),
        },
        ["kind", "train"],
    ),
}

SCHEDULES = ("linear", "cosine", "constant", "constant_with_warmup", "polynomial", "inverse_sqrt")
SETTINGS: dict[str, Schema] = {
    "layer_decay": _number("Factor on the learning rate for every block further from the output.", above=0, high=1),
    "epochs": _number("Passes over the data.", default=3, above=0),
    "steps": _count("Steps at most; overrides epochs."),
    "lr": _number("Learning rate.", default=5e-5, above=0),
    "batch": _count("Examples in a batch.", default=8),
    "accumulate": _count("Batches in a step.", default=1),
    "schedule": {"enum": list(SCHEDULES), "default": "linear"},
    "warmup": _number("Share of the steps in which the learning rate rises.", default=0.0, low=0, below=1),
    "weight_decay": _number("Decoupled, of matrices only.", default=0.0, low=0),
    "optimizer": {"type": "string", "default": "adamw_torch", "description": "A name that transformers knows."},
    "seed": {"type": "integer", "default": 0, "minimum": 0, "maximum": 2**32 - 1},
    "precision": {"enum": ["float32", "bfloat16"], "default": "float32", "description": "Of the forward and backward pass."},
    "device": {"enum": ["auto", "cpu", "cuda"], "default": "auto"},
    "save_every": _count("Steps between saved states; default: the ends of epochs."),
}
OUTPUTS = ("checkpoint", "delta", "adapter")
