#!/usr/bin/env bash
# Builds the wheel and the sdist, and uses them as others will.
# usage: package.sh PYTHON ENVIRONMENT, of which the second has what the tests need; such
# as package.sh python3.13 .venv
set -euo pipefail
cd "$(dirname "$0")/.."
python=$1 env=$(realpath "$2") clone=$PWD
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_QUIET=1 JAX_PLATFORMS=cpu

"$python" -m venv "$work/build"
"$work/build/bin/pip" install "$(grep -o 'hatchling==[0-9.]*' pyproject.toml)"
"$work/build/bin/python" -m hatchling build --directory "$work/dist" >/dev/null 2>&1

echo "The wheel, in an environment of its own"
"$python" -m venv "$work/user"
user=$work/user/bin
"$user/pip" install -c constraints.txt "$work"/dist/*.whl mypy
cd "$work"
cat >use.py <<'PY'
import jax
import jax.numpy as jnp

import dropit_jax

assert set(dir(dropit_jax)) == {*dropit_jax.__all__, "__version__"}
assert "h100" in dropit_jax.memory.targets()
x = jax.ShapeDtypeStruct((128, 128), jnp.float32)
try:
    report = dropit_jax.memory.compile_report(lambda x: jnp.exp(x @ x), x, target="h100")
except dropit_jax.memory.CompilerMissingError as error:
    print(str(error).partition(": ")[2])
else:
    assert report.flops == 2 * 128**3
    print(dropit_jax.__version__)
PY
PATH=$user:$PATH PIP_CONSTRAINT=$clone/constraints.txt sh -c "$("$user/python" use.py)"
[ "$("$user/python" use.py)" = "$(cd "$clone" && "$env/bin/python" -c 'import dropit_jax; print(dropit_jax.__version__)')" ]
cat >typed.py <<'PY'
from dropit_jax import DropIT

DropIT(rate="high")
PY
"$user/mypy" typed.py | tee mypy.txt >/dev/null || true
grep -q 'incompatible type "str"; expected "float"' mypy.txt || {
  cat mypy.txt
  exit 1
}

echo "The sdist, which has all that its tests import"
tar -xzf "$work"/dist/*.tar.gz
cd "$work"/dropit_jax-*/
"$env/bin/python" -m pytest --collect-only --quiet -p no:cacheprovider tests | tail -n 1

echo "An editable install, which adds dropit_jax alone"
cd "$work"
for name in tests train configs benchmarks; do
  if "$env/bin/python" -c "import $name" 2>/dev/null; then
    echo "$name can be imported outside of the clone"
    exit 1
  fi
done
"$env/bin/python" -c 'import dropit_jax'
