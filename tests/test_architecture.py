"""The rules of docs/design.md and STYLE as programs: who imports what, and how large things get."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "octavo"
FILES = sorted(PACKAGE.rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))
BENCHMARKS = sorted((ROOT / "benchmarks").rglob("*.py"))

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 80
MAX_TRITON_FUNCTION_LINES = 150

TORCH_FREE = (
    "async_llm.py",
    "cli",
    "config",
    "device.py",
    "errors.py",
    "fleet",
    "folders.py",
    "formats.py",
    "kv_cache",
    "observe",
    "outputs.py",
    "request.py",
    "scheduler",
    "server",
    "step.py",
    "tools",
    "visibility.py",
    "engine/attached.py",
    "engine/chat_template.py",
    "engine/client.py",
    "engine/core.py",
    "engine/detokenizer.py",
    "engine/fleet.py",
    "engine/fleet_core.py",
    "engine/fleet_link.py",
    "engine/front_end.py",
    "engine/input_processor.py",
    "engine/ipc.py",
    "engine/link.py",
    "engine/mailbox.py",
    "engine/memory.py",
    "engine/output_processor.py",
    "engine/prefixes.py",
    "engine/template_sandbox.py",
    "engine/token_guard.py",
    "engine/tokenizer.py",
    "kernels/facts.py",
    "kernels/activations.py",
    "kernels/limits.py",
    "kernels/routing.py",
    "layers/rope_spec.py",
    "models/attention_spec.py",
    "models/config_classes.py",
    "models/deepseek.py",
    "models/family.py",
    "models/gemma.py",
    "models/gpt_oss.py",
    "models/hf_config.py",
    "models/hf_layers.py",
    "models/hf_rope.py",
    "models/llama.py",
    "models/llama4.py",
    "models/mixtral.py",
    "models/mlp_spec.py",
    "models/olmoe.py",
    "models/parameter.py",
    "models/pruned.py",
    "models/qwen.py",
    "models/registry.py",
    "models/spec.py",
    "weights/checkpoint.py",
    "weights/demo.py",
    "weights/gguf_architecture.py",
    "weights/gguf_config.py",
    "weights/gguf_experts.py",
    "weights/gguf_file.py",
    "weights/gguf_glm.py",
    "weights/gguf_grouped.py",
    "weights/gguf_latent.py",
    "weights/gguf_pretokenizers.py",
    "weights/gguf_reader.py",
    "weights/gguf_specials.py",
    "weights/gguf_tokenizer.py",
    "weights/hub.py",
    "weights/names.py",
    "weights/split.py",
)
WITH_TORCH = {"kv_cache/storage.py", "cli/bench/peer.py", "cli/bench/device_profile.py"}
"""The storage holds the tensors; benchmarks load a peer, and torch's profiler, when asked to."""


def name_of(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


def is_torch_free(path: Path) -> bool:
    name = name_of(path)
    inside = any(name == part or name.startswith(f"{part}/") for part in TORCH_FREE)
    return inside and name not in WITH_TORCH


def nodes(path: Path) -> Iterator[ast.AST]:
    return ast.walk(ast.parse(path.read_text(encoding="utf-8")))


def imported(path: Path) -> set[str]:
    """All imports of a file, those in functions too."""
    found: set[str] = set()
    for node in nodes(path):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module or "")
    return found


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_ray_is_imported_by_its_own_package_alone():
    for path in FILES:
        if path.is_relative_to(PACKAGE / "deploy" / "ray"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            match node:
                case ast.Import(names):
                    modules = [one.name for one in names]
                case ast.ImportFrom(module=str(module), level=0):
                    modules = [module]
                case _:
                    continue
            assert not [one for one in modules if one.partition(".")[0] == "ray"], path
            assert not [one for one in modules if one.startswith("octavo.deploy")], path


def test_imports_run_downward():
    linter = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run(
        [str(linter), "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_host_side_never_imports_torch():
    found = [
        f"{name_of(path)} imports {name}"
        for path in FILES
        # device.py asks torch about GPUs inside functions; the next test sees that it does no more.
        if is_torch_free(path) and name_of(path) != "device.py"
        for name in imported(path)
        if name.split(".")[0] in ("torch", "transformers")
    ]
    assert not found


def test_runners_name_no_back_end():
    """They carry the plans of whatever back end there is, and ask what it wants, not who it is."""
    runners = [path for path in FILES if name_of(path).startswith("runner/")]
    own = ("octavo.kernels.triton", "octavo.kernels.cpu", "octavo.kernels.reference", "triton")
    found = [
        f"{name_of(path)} imports {name}"
        for path in runners
        for name in imported(path)
        if name.startswith(own)
    ]
    found += [
        f"{name_of(path)}:{node.lineno} asks for a name"
        for path in runners
        for node in nodes(path)
        if isinstance(node, ast.Attribute) and node.attr == "name" and "ops" in ast.unparse(node)
    ]
    assert len(runners) > 5
    assert not found


def test_importing_the_host_side_loads_no_torch():
    names = [
        "octavo." + name_of(path).removesuffix(".py").replace("/", ".").removesuffix(".__init__")
        for path in FILES
        if is_torch_free(path)
    ]
    code = f"import sys, importlib\nfor n in {names!r}: importlib.import_module(n)\n"
    assert run_python(code + "print('torch' in sys.modules)").strip() == "False"


def test_the_front_process_loads_no_torch():
    for name in ("octavo.AsyncLLM", "octavo.server.app", "octavo.server.serve", "octavo.cli.plan"):
        module, _, last = name.rpartition(".")
        code = f"import sys\nfrom {module} import {last}\nprint('torch' in sys.modules)"
        assert run_python(code).strip() == "False", name


def test_octavo_plan_loads_neither_torch_nor_http(tmp_path: Path):
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    code = (
        "import sys\nfrom octavo.cli import main\n"
        f"assert main(['plan', {str(tmp_path)!r}, '--memory', '8GiB', '--device', 'cpu']) == 0\n"
        "heavy = 'torch transformers fastapi uvicorn jinja2 zmq'.split()\n"
        "print([n for n in heavy if n in sys.modules])"
    )
    assert run_python(code).splitlines()[-1] == "[]"


def test_help_loads_nothing_heavy():
    code = (
        "import sys\nfrom octavo.cli import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\n"
        "heavy = 'torch fastapi starlette transformers numpy httpx rich tokenizers'.split()\n"
        "print([n for n in heavy if n in sys.modules])"
    )
    assert run_python(code).splitlines()[-1] == "[]"


def test_only_config_reads_the_environment():
    found = [
        f"{name_of(path)}:{node.lineno}"
        for path in FILES
        if name_of(path) != "config/environment.py"
        for node in nodes(path)
        if isinstance(node, ast.Attribute)
        and node.attr in ("environ", "getenv")
        and isinstance(node.value, ast.Name)
        and node.value.id == "os"
    ]
    assert not found


def test_cuda_is_named_in_device_and_runner_alone():
    found = [
        f"{name_of(path)}:{node.lineno}"
        for path in FILES
        if name_of(path) != "device.py" and not name_of(path).startswith("runner/")
        for node in nodes(path)
        if isinstance(node, ast.Attribute)
        and node.attr == "cuda"
        and isinstance(node.value, ast.Name)
        and node.value.id == "torch"
    ]
    assert not found


def test_files_fit_a_head():
    files = FILES + TESTS + BENCHMARKS
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in files}
    assert not {str(path): n for path, n in lengths.items() if n > MAX_FILE_LINES}


def test_functions_fit_a_screen():
    found = []
    for path in FILES:
        limit = MAX_TRITON_FUNCTION_LINES if "triton" in path.parts else MAX_FUNCTION_LINES
        for node in nodes(path):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                if length > limit:
                    found.append(f"{name_of(path)}: {node.name} has {length} lines")
    assert not found


def test_code_is_ascii():
    assert not [p for p in FILES + TESTS if not p.read_text(encoding="utf-8").isascii()]


def test_no_file_is_a_drawer():
    assert not [p for p in FILES + TESTS if p.stem in ("utils", "common", "helpers")]


def test_no_test_file_imports_another():
    """What tests share stands in modules of its own: a test file may be skipped as a whole."""
    found = []
    for path in TESTS:
        for node in nodes(path):
            match node:
                case ast.Import(names):
                    modules = [one.name for one in names]
                case ast.ImportFrom(module, names):
                    modules = [f"{module or ''}.{one.name}" for one in names] + [module or ""]
                case _:
                    continue
            inside = [one for one in modules if one.startswith("tests.") or ".test_" in f".{one}"]
            if any(part.startswith("test_") for one in inside for part in one.split(".")):
                found.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert not found


def test_no_attribute_is_guessed():
    found = [
        f"{name_of(path)}:{node.lineno}"
        for path in FILES
        for node in nodes(path)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and (node.func.id == "hasattr" or (node.func.id == "getattr" and len(node.args) == 3))
    ]
    assert not found


def test_every_module_says_what_it_owns():
    texts = {path: path.read_text(encoding="utf-8") for path in FILES}
    assert not [
        name_of(path)
        for path, text in texts.items()
        if text.strip() and not ast.get_docstring(ast.parse(text))
    ]


def test_the_walk_names_files_and_methods_that_are_there():
    text = (ROOT / "docs" / "walk.md").read_text()
    paths = set(re.findall(r"`([a-z_0-9/]+\.py|[a-z_]+/)`", text))
    assert len(paths) > 40
    assert [path for path in sorted(paths) if not (PACKAGE / path).exists()] == []
    package = "\n".join(path.read_text() for path in FILES)
    for owner, method in re.findall(r"`([A-Z]\w+)\.(\w+)`", text):
        assert re.search(rf"class {owner}\b[\s\S]*?def {method}\(", package), (owner, method)
