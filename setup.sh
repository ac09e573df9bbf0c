# Sourced by run.sh and test.sh: makes .venv if there is none, installs the tested versions once, and activates it.
# PYTHON=python3.12 ./test.sh chooses the interpreter.
stamp=".venv/.installed"
wanted="$(cat requirements.txt constraints.txt | cksum)"
if [ ! -f "$stamp" ] || [ "$(cat "$stamp")" != "$wanted" ]; then
    [ -x .venv/bin/python ] || "${PYTHON:-python3}" -m venv .venv
    .venv/bin/python -m pip install --disable-pip-version-check -q -r requirements.txt -c constraints.txt
    # Without its dependencies, which requirements.txt has: it declares pillow<13, older than what reads YCbCr TIFFs,
    # and tests/test_app.py passes with 13.
    .venv/bin/python -m pip install --disable-pip-version-check -q --no-deps gradio -c constraints.txt
    printf '%s' "$wanted" > "$stamp"
fi
source .venv/bin/activate
# Threads that spin while they wait slow each other down where cores are few.
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-passive}"
