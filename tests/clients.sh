#!/bin/sh
# Runs the tests with other people's libraries, in an environment that has them: pip install -e ".[clients]"
# (sinabs, which asks for an older nir and runs with a newer: pip install --no-deps sinabs pbr; the worm's
# connectome: pip install --no-deps cect==0.3.5).
# Usage: tests/clients.sh [pytest arguments]
set -eu
cd "$(dirname "$0")/clients"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
python -m pytest -c pytest.ini "$@"
