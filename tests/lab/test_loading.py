"""Objects of the user's, found by module or file."""

import pickle
import sys

import pytest

from bn_jax.errors import UserError
from bn_jax.lab.loading import load_object


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A user's folder, which they are in; what it adds to Python's modules is taken away."""
    files = {
        "mine_nets.py": "from mine_parts import width\nclass Net:\n    sizes = (width,)\n",
        "mine_parts.py": "width = 7\n",
        "mine-2.py": "from mine_parts import width\ntwice = 2 * width\n",
        "json.py": "own = True\n",
        "mine_broken.py": "\nimport no_such_module_of_mine\n",
        "mine_typo.py": "x = 1\ndef f(:\n    pass\n",
        "mine_raising.py": "def f():\n    raise RuntimeError('not\\ntoday')\n\nf()\n",
        "mine_leaving.py": "raise SystemExit(3)\n",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "mine_package").mkdir()
    (tmp_path / "mine_package" / "nets.py").write_text("Net = 5\n")
    before = dict(sys.modules)
    monkeypatch.chdir(tmp_path)
    path = list(sys.path)
    yield tmp_path
    assert sys.path == path
    for name in sys.modules.keys() - before.keys():
        del sys.modules[name]


def test_from_modules_and_files(folder, monkeypatch):
    assert load_object("mine_nets:Net.sizes", "model") == (7,)
    assert load_object("mine_package.nets:Net", "model") == 5
    monkeypatch.chdir("/")
    net = load_object(f"{folder}/mine_nets.py:Net", "model")
    assert net.sizes == (7,)
    assert load_object(f"{folder}/mine_nets.py:Net", "model") is net
    assert pickle.loads(pickle.dumps(net)) is net
    assert load_object(f"{folder}/mine-2.py:twice", "model") == 14
    assert load_object(f"{folder}/json.py:own", "model") is True
    assert load_object("json:dumps", "model")(1) == "1"


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("mine_nets.py", r": say package.module:name or file.py:name$"),
        ("mine_nets:", r": say package.module:name or file.py:name$"),
        ("other.py:Net", r": there is no file other.py$"),
        ("mine_other:Net", r": there is no module mine_other$"),
        ("mine_package.other:Net", r": there is no module mine_package.other$"),
        ("mine_nets:Nett", r": mine_nets has no Nett: there is width, Net$"),
        (
            "mine_broken:Net",
            r"NotFoundError: No module named 'no_such\w+' \(mine_broken.py, ",
        ),
        ("mine_typo.py:Net", r"SyntaxError: .* \(mine_typo.py, line 2\)$"),
        ("mine_raising:f", r"does not import: RuntimeError: not \(mine_raising.py, line 2\)$"),
        ("mine_leaving.py:f", r"does not import: SystemExit: 3 \(mine_leaving.py, line 1\)$"),
    ],
)
@pytest.mark.usefixtures("folder")
def test_what_is_not_there_is_refused_in_one_line(text, match):
    with pytest.raises(UserError, match=match) as refused:
        load_object(text, "model")
    assert str(refused.value).startswith(f"--model={text}: ")
    assert len(str(refused.value).splitlines()) == 1
