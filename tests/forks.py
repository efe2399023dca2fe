"""One process that imports everything once; commands and ranks are forks of it, and so start at once."""

import multiprocessing
import os

for name, value in {"DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}.items():
    os.environ.setdefault(name, value)
START = multiprocessing.get_context("forkserver")
"""Starts forks. A process has one server: all that tests fork shares it, and what it imports."""
START.set_forkserver_preload(
    [
        *("rarec.cli", "rarec.stages.run", "rarec.stages.results", "rarec.stages.export"),
        *("rarec.stages.variant_training", "rarec.data.engines.duckdb_engine", "rarec.data.preparation.pipeline"),
        *("rarec.ids.make", "rarec.ids.trainer", "rarec.neighbours.ease", "rarec.neighbours.lexical"),
        "rarec.neighbours.semantic",
        *("rarec.models.language_model", "rarec.models.llm_attention", "rarec.training.loop", "rarec.training.zero"),
        *("rarec.distributed.watchdog", "rarec.planning.advice", "rarec.report.html"),
        *("rarec.evaluation.evaluator", "rarec.evaluation.collapse", "rarec.evaluation.diagnostics"),
        *("rarec.bundle.recommender", "rarec.bundle.realign", "rarec.bundle.items", "rarec.bundle.users"),
        # what libraries import when they are first used: half of the time of a command over a tiny world
        *("ibis.backends.duckdb", "matplotlib.backends.backend_svg", "mpl_toolkits.mplot3d", "peft", "scipy.stats"),
        *("sklearn.feature_extraction.text", "sqlglot.dialects.duckdb"),
        *("torch.distributed.nn", "torch.utils.tensorboard"),
        *("transformers.models.bert.modeling_bert", "transformers.models.llama.modeling_llama"),
        "tests.ranks",
    ]
)
"""Modules that a command or a rank would import; one that does not exist is skipped."""
