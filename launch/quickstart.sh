#!/usr/bin/env bash
# From raw text to a trained, evaluated, exported model: the environment, then the main job on the corpus that ships.
#
#   bash launch/quickstart.sh [--output FOLDER] [--ranks N] [-- section.key=value ...]
#
#   --output FOLDER  where everything goes (default: runs/quickstart)
#   --ranks N        training processes (default: 2)
#   after --         changes to launch/recipes/quickstart.yaml
#
# Run it again after it was stopped: what is complete is kept, and training goes on from its newest checkpoint.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=environment.sh
source launch/environment.sh

output=runs/quickstart
ranks=2
while [ $# -gt 0 ]; do
    case $1 in
    --output) output=${2:?--output needs a folder} && shift ;;
    --ranks) ranks=${2:?--ranks needs a number} && shift ;;
    --) shift && break ;;
    *)
        sed -n '2,9s/^# \{0,1\}//p' "$0"
        exit 64
        ;;
    esac
    shift
done
corpus=launch/corpus/documents.jsonl.gz
data=$output/data
prompt='The PostgreSQL server'

step() { # step TEXT COMMAND...: say what is done and with which words, then do it
    say "$1"
    shift
    echo "    $*"
    "$@"
}

make_environment
warm_deepspeed
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} HF_HUB_OFFLINE=1
began=$SECONDS

# data-tools publishes a folder when it is complete, so a folder that is there is whole.
[ -e "$data/tokenizer" ] || step 'Train a tokenizer' \
    data-tools train-tokenizer "$corpus" --type bpe --vocab-size 4096 --output "$data/tokenizer"
[ -e "$data/tokens" ] || step 'Encode the corpus into token shards' \
    data-tools prepare "$corpus" --tokenizer "$data/tokenizer" --output "$data/tokens" --split 0.97,0.02,0.01
[ -e "$data/packed" ] || step 'Pack documents into rows' \
    data-tools pack "$data/tokens" --sequence-length 256 --method concat --output "$data/packed"

run=(launch/recipes/quickstart.yaml "run_folder=$output" "data.train=$data/packed" "data.validation.main=$data/packed"
    "reporting.mlflow_uri=sqlite:///$output/mlflow.db" "$@")
step 'What this run will do' pretrain check "${run[@]}" --world-size "$ranks"
step "Pretrain with DeepSpeed on $ranks ranks" \
    torchrun --standalone --nproc-per-node "$ranks" -m pretrain train "${run[@]}" --resume auto
step 'Evaluate' pretrain evaluate "$output"
step 'Generate' pretrain generate "$output" --prompt "$prompt" --max-new-tokens 60
rm -rf "$output/exported" # of an earlier call, perhaps of an earlier step
step 'Export to a Hugging Face folder' pretrain export "$output" --output "$output/exported"

say "Five lines that know only transformers"
python - "$output/exported" "$prompt" <<'PYTHON'
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer, model = AutoTokenizer.from_pretrained(sys.argv[1]), AutoModelForCausalLM.from_pretrained(sys.argv[1])
written = model.generate(**tokenizer(sys.argv[2], return_tensors="pt"), max_new_tokens=40, do_sample=True)
print(tokenizer.decode(written[0]))
PYTHON

say "Done in $((SECONDS - began)) s after the environment; everything is in $output"
python -m launch.quickstart_result "$output"
