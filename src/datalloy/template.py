"""The commented recipe that `datalloy init` writes."""

RECIPE_TEMPLATE = """\
# A Datalloy recipe. Paths are relative to this file. Every key that is left out has a default;
# `datalloy run THIS.yaml --dry-run` prints all of them with counts and a cost estimate, and stops.
name: my-selection

# The model to be tuned, and the small model that scores samples (default: base).
# A folder, a hub id, or `tiny`, the model that comes with Datalloy.
base: tiny
# proxy: path-or-hub-id

# Folder that the paths of data start from (default: this file's folder).
# data_root: .

# The pool: named datasets. JSONL, JSON, Parquet; layouts messages, sharegpt, llava, alpaca or prompt_completion;
# FOLDER#SPLIT of a saved or hub dataset, dataset_info.json#NAME, shard-{000..009}.tar (docs/integrations.md).
domains:
  first: {path: data/first.jsonl}
  second: {path: data/second.jsonl}

# What you want to get better at: named validation sets, about 100 items each, not in the pool.
# metric: exact_match | relaxed_accuracy | option_letter | anls | answer_probability | loss
targets:
  goal: {path: data/goal.jsonl, metric: exact_match}

# Held-out sets: measured at the end, never used to decide anything.
evaluation:
  holdout: {path: data/holdout.jsonl, metric: exact_match}

# How samples are scored. auto: short measured runs decide between scorers.
# Methods: exact (the definition, dear), tail (exact on the last layers), calibrated, first_order, random, low_loss,
# low_loss_by_length (among answers of like length: keeps long, hard ones that low_loss drops),
# low_loss_by_neighbours (among prompts that are alike to the proxy: keeps hard kinds of question),
# right_and_wanted (the same, and what the targets ask for: the best where little is kept) ...
score:
  method: auto

# What is kept. auto: the same short runs decide the fraction, for at most bakeoff_epochs passes over the pool.
select:
  keep_fraction: auto
  diversity: off   # facility_location | threshold: leave out near-copies
  drop_toxic: true
  bakeoff_epochs: 5

# How models are trained. fixed_compute sees `samples` samples whatever was kept.
train:
  adapter: lora
  rank: 16
  learning_rate: 2e-5
  batch_size: 128
  samples: 100000

# What share of training each domain gets. One expert a domain is trained, merged models are searched, and a few
# mixtures are really trained to check the advice. Costs one training run a domain and `verify_runs` more. Needs two
# domains, or `buckets: 3`, which mixes parts of each domain by score.
# objective: mean | weighted | worst | pareto. metric: probability (of right answers) | loss | target (writes answers)
# mixture: {objective: mean, metric: probability, verify_runs: 3}

# How answers are generated and judged; the intervals are bootstraps over items.
evaluate:
  max_new_tokens: 64
  confidence: 0.95

# Who rates samples where score.method or select.bakeoff_arms says deita; default: the proxy as it comes.
# deita: {quality_model: path-or-hub-id, complexity_model: path-or-hub-id}

# The model that judges where they say judge: any server of OpenAI's chat API. The key comes from the environment.
# judge: {url: "http://localhost:8000/v1", model: name-on-the-server}

# What happens when a target or evaluation item is also in the pool. on_leak: error | drop | allow
leakage:
  on_leak: error

# What `run` writes for training elsewhere; `datalloy export --to FORMAT` does so at any time for a finished run.
# Formats: rows (your own, byte for byte) | llama-factory | ms-swift | trl | axolotl | energon | webdataset | ids
# export: {formats: [rows]}

# A file of which a larger share is rejected stops the run.
max_rejected_fraction: 0.01

# Where models run: auto | cpu | cuda | mps
# device: auto

# Who does the work: local, this process (or those of torchrun); ray, a cluster. The results are the same.
# engine: local
# ray: {address: auto, num_workers: 8, gpus_per_worker: 1}
"""
