"""The rollout package runs in an image without torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import tandem_rollout

FOLDER = Path(tandem_rollout.__file__).parent


def test_no_module_imports_torch_or_vllm() -> None:
    modules = [
        ".".join(["tandem_rollout", *path.relative_to(FOLDER).with_suffix("").parts]).removesuffix(".__init__")
        for path in sorted(FOLDER.rglob("*.py"))
    ]
    program = f"import {', '.join(modules)}\nimport sys\nprint(*{{'torch', 'vllm'}} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.split() == []


def test_tools_work_without_torch() -> None:
    """transformers looks for torch when it makes a schema, and does without if there is none."""
    program = (
        "import sys; sys.modules['torch'] = None\n"
        "import transformers.utils.import_utils as found; found.is_torch_available.cache_clear()\n"
        "from tandem_rollout.tools import Tool\n"
        "def f(a: int) -> int:\n    '''Add.\n\n    Args:\n        a: one\n    '''\n"
        "print(Tool.of(f).schema['function']['parameters']['required'])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=120)
    assert done.stdout.strip() == "['a']", done.stderr
