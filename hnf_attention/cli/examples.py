"""Examples of each command, for its help."""

EXAMPLES = {
    "demo": (
        "hnf-attention demo",
        "hnf-attention demo --quick --json -",
        "hnf-attention demo --seed 3 --device cuda --out runs/demo",
    ),
    "analyze": (
        "hnf-attention analyze gpt2",
        "hnf-attention analyze ./my-model --text sample.txt --json report.json --figures figures",
        "hnf-attention analyze org/model --revision main --dtype auto --device-map auto --max-windows 8",
        "hnf-attention analyze ./my-model --threshold low_entropy=0.1 --fail-on warning",
    ),
    "check": (
        "hnf-attention check design.json --seq-len 4096 --dtype bf16",
        "hnf-attention check gpt2 --region region.png",
        "hnf-attention check wide.json deep.json ./my-model --dtype bf16 --region regions.png",
        "hnf-attention check ./my-model --weights --json - --fail-on marginal",
    ),
    "trace": (
        "hnf-attention trace train.py:failing_step -o reproduction",
        "hnf-attention trace ./my-model --dtype float16 --text sample.txt",
        "hnf-attention trace ./my-model --inputs batch.safetensors --autocast bfloat16 --json -",
    ),
    "report": (
        "hnf-attention report run.db -o report.html",
        "hnf-attention report before.db after.db -o both.html",
        "hnf-attention report run.db --metric logit_range_max --metric key_norm --json -",
    ),
    "watch": (
        "hnf-attention watch run.db",
        "hnf-attention watch run.db --metric normalized_entropy",
        "hnf-attention watch run.db --once --json -",
    ),
    "export": (
        "hnf-attention export run.db -o run.parquet",
        "hnf-attention export run.db -o run.jsonl",
    ),
    "doctor": (
        "hnf-attention doctor",
        "hnf-attention doctor --json -",
        "hnf-attention doctor --warm --heads 32 --kv-heads 8 --head-dim 128",
    ),
}
