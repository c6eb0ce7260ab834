#!/usr/bin/env bash
# Train the runs behind the figures of this folder: every task x method x seed, one checkpoint an epoch.
#   figures/study.sh GLUE_DIR RUNS_DIR        (settings: TASKS, SEEDS, EPOCHS, MODEL, JOBS at a time)
set -euo pipefail
data=$1
runs=$2
for task in ${TASKS:-cola mrpc stsb}; do
    for seed in ${SEEDS:-1 2 3 4 5}; do
        for method in "lora --rank 8" "msplora --ranks 8,4,2" "msplora --ranks 8,8,8"; do
            name=$(tr ', ' '-' <<<"${method/ --ranks/}" | sed 's/---rank//')
            echo "--task $task --seed $seed --method $method --output-dir $runs/$task/$name/seed-$seed"
        done
    done
done | xargs -P "${JOBS:-1}" -I{} sh -c \
    "${TRAIN:-msplora-train} --model ${MODEL:-minilm} --data-dir $data --epochs ${EPOCHS:-20} {} > /dev/null"
