#!/usr/bin/env bash
# Checks and measures on one GPU what only a GPU can show, in about ten minutes on an H100:
#
#     bash tests/gpu.sh              # all parts; those that are done, as out/gpu says, are not done again
#     bash tests/gpu.sh decode_8b    # this part, in any case
#
# What a part prints is kept as out/gpu/PART.txt. transformers is a contestant where it is installed.
set -uo pipefail
cd "$(dirname "$0")/.."
parts=(checks decode_8b decode_8b_int8 decode_1b train_1b loss)

run_part() {
    case $1 in
        checks) pytest -n0 -m cuda -rs tests ;;
        decode_8b) python bench.py --preset llama3.1-8b --device cuda --rounds 3 --peers ;;
        decode_8b_int8) python bench.py --preset llama3.1-8b --device cuda --rounds 3 --quantize int8 ;;
        decode_1b) python bench.py --preset llama3.2-1b --device cuda --rounds 3 --peers ;;
        train_1b) python bench.py train --preset llama3.2-1b --device cuda --batch_size 4 --seq_len 2048 \
            --rounds 3 ;;
        loss) PYTHONPATH=. python docs/linear_cross_entropy.py 128256 4096 2048 5 cuda ;;
        *) echo "found the part $1; expected one of: ${parts[*]}" >&2; return 2 ;;
    esac
}

python -c 'import sys, torch; sys.exit(None if torch.cuda.is_available() else "found no GPU that torch can use")' \
    || exit 1
mkdir -p out/gpu
failed=0
for part in "${@:-${parts[@]}}"; do
    if [ $# -eq 0 ] && [ -e "out/gpu/$part.txt" ]; then
        echo "== $part: done before, as out/gpu/$part.txt says"
        continue
    fi
    echo "== $part"
    if run_part "$part" 2>&1 | tee "out/gpu/$part.part"; then
        mv "out/gpu/$part.part" "out/gpu/$part.txt"
    else
        echo "== $part failed; see out/gpu/$part.part" >&2
        failed=1
    fi
done
exit $failed
