"""Image, cluster and job files, checked without a cloud: against Ray's own schema and validators, and against each other.

python -m pytest tests/test_infrastructure.py
"""

import json
import logging
import re
import subprocess
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
RAY = "2.60.0"
# What a line that holds a key looks like: an assignment, or a name and a value, with something behind it.
SECRET = re.compile(r"(MISTRAL_API_KEY|HF_TOKEN|WANDB_API_KEY|RAY_AUTH_TOKEN)\s*[=:][ \t]*[^\s#]")


def read(name):
    return (ROOT / name).read_text(encoding="utf-8")


def load(name):
    return yaml.safe_load(read(name))


def requirements(*extras):
    project = tomllib.loads(read("pyproject.toml"))["project"]
    lists = [project["dependencies"], *(project["optional-dependencies"][extra] for extra in extras)]
    return [Requirement(line) for group in lists for line in group]


def constraints(name):
    lines = [line for line in read(name).splitlines() if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9_.-]+==[A-Za-z0-9_.]+", line) for line in lines)
    pairs = [line.split("==") for line in lines]
    names = [name.lower().replace("_", "-") for name, _ in pairs]
    assert len(names) == len(set(names))
    return dict(zip(names, (version for _, version in pairs), strict=True))


@pytest.mark.parametrize(("name", "extras"), [("constraints.txt", ["dev"]), ("constraints-gpu.txt", ["gpu"])])
def test_constraints_lie_within_the_project_s_ranges(name, extras):
    pinned = constraints(name)
    for requirement in requirements(*extras):
        version = pinned.get(requirement.name.lower().replace("_", "-"))
        assert version is None or requirement.specifier.contains(Version(version), prereleases=True), requirement


def test_every_direct_dependency_is_pinned_for_the_cpu():
    assert {requirement.name.lower() for requirement in requirements("dev")} <= set(constraints("constraints.txt"))


def test_what_was_measured_on_a_gpu_is_pinned():
    pinned = constraints("constraints-gpu.txt")
    measured = {
        "torch": "2.11.0",
        "ray": RAY,
        "transformers": "5.23.0",
        "trl": "1.16.0",
        "peft": "0.21.2",
        "bitsandbytes": "0.50.2",
        "vllm": "0.26.0",
    }
    assert measured.items() <= pinned.items()


def test_all_packages_and_templates_are_packaged():
    setuptools = tomllib.loads(read("pyproject.toml"))["tool"]["setuptools"]
    found = {
        path.parent.relative_to(ROOT).as_posix().replace("/", ".")
        for folder in ("nli", "ray_jobs")
        for path in (ROOT / folder).rglob("*.py")
    }
    assert set(setuptools["packages"]) == found
    assert {f"nli.{path.parts[-3]}" for path in (ROOT / "nli").rglob("*.j2")} <= set(setuptools["package-data"])


def test_the_cluster_fits_ray_s_schema_and_ray_prepares_it():
    import jsonschema
    import ray.autoscaler
    from ray.autoscaler._private.util import prepare_config, validate_config

    cluster = load("cluster.yaml")
    schema = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())
    jsonschema.validate(cluster, schema)
    prepared = prepare_config(cluster)
    validate_config(prepared)
    # Setup and start commands are ours, not those of Ray's defaults, which install a nightly Ray.
    assert prepared["head_setup_commands"] == ['pip install "boto3>=1.34"']
    assert prepared["worker_setup_commands"] == []


def test_a_misspelt_field_of_the_cluster_would_be_refused():
    import jsonschema
    import ray.autoscaler

    schema = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())
    with pytest.raises(jsonschema.ValidationError, match="max_worker"):
        jsonschema.validate(load("cluster.yaml") | {"max_worker": 8}, schema)


def test_the_cluster_has_one_head_without_a_gpu_and_gpu_workers_that_come_and_go():
    cluster = load("cluster.yaml")
    types = cluster["available_node_types"]
    assert types[cluster["head_node_type"]]["max_workers"] == 0
    assert "GPU" not in types[cluster["head_node_type"]]["resources"]
    workers = [kind for name, kind in types.items() if name != cluster["head_node_type"]]
    assert all(kind["resources"]["GPU"] >= 1 and kind["min_workers"] == 0 for kind in workers)
    assert sum(kind["max_workers"] for kind in workers) == cluster["max_workers"]


def test_the_cluster_s_authentication_is_explicit_and_its_token_travels_as_a_file():
    cluster = load("cluster.yaml")
    assert "--env RAY_AUTH_MODE=token" in cluster["docker"]["run_options"]
    assert cluster["file_mounts"]["/home/ray/.ray/auth_token"] == "~/.ray/auth_token"
    assert all(
        "--dashboard-host=127.0.0.1" in command
        for command in cluster["head_start_ray_commands"]
        if "ray start" in command
    )


def test_outputs_of_the_cluster_lie_on_a_folder_that_every_node_mounts():
    cluster = load("cluster.yaml")
    options = cluster["docker"]["run_options"]
    assert {
        "--volume /mnt/nli:/mnt/nli",
        "--env NLI_STORAGE_ROOT=/mnt/nli",
        "--env HF_HOME=/mnt/nli/huggingface",
    } <= set(options)
    assert any("sudo mount" in command and "/mnt/nli" in command for command in cluster["initialization_commands"])


def test_keys_reach_the_nodes_from_dot_env_on_head_and_workers_alike():
    cluster = load("cluster.yaml")
    assert cluster["file_mounts"]["/home/ray/nli.env"] == ".env"
    for commands in (cluster["head_start_ray_commands"], cluster["worker_start_ray_commands"]):
        start = next(command for command in commands if "ray start" in command)
        assert start.startswith("set -a; . ~/nli.env; set +a; ")


@pytest.mark.parametrize(
    "name", ["cluster.yaml", "runtime_env.yaml", "kuberay/rayjob.yaml", "Dockerfile", "example.env", "Makefile"]
)
def test_no_file_holds_a_secret(name):
    lines = [line for line in read(name).splitlines() if SECRET.search(line)]
    assert lines == []


def test_example_env_names_the_keys_and_git_ignores_the_filled_copy():
    names = [line.removesuffix("=") for line in read("example.env").splitlines() if line and not line.startswith("#")]
    assert names == ["MISTRAL_API_KEY", "HF_TOKEN", "WANDB_API_KEY"]
    assert ".env" in read(".gitignore").splitlines()


def test_the_runtime_env_passes_ray_s_validation():
    from ray.runtime_env import RuntimeEnv

    given = load("runtime_env.yaml")
    checked = RuntimeEnv(**given)
    assert checked["working_dir"] == "."
    assert set(checked["env_vars"]) == {"TOKENIZERS_PARALLELISM", "RAY_TRAIN_ENABLE_PRINT_PATCH"}
    assert not {"pip", "uv", "conda", "image_uri"} & set(given)
    assert re.search(r"^  # NLI_STORAGE_ROOT: /", read("runtime_env.yaml"), re.MULTILINE)


def test_a_job_s_folder_holds_code_configs_and_sample_and_nothing_else(tmp_path):
    from ray._private.runtime_env.packaging import create_package

    project = tmp_path / "project"
    travels = [
        "nli/training/run.py",
        "nli/evaluation/templates/report.html.j2",
        "nli/sample/world.py",
        "ray_jobs/train_sft.py",
        "configs/demo/pipeline.py",
        "data/sample/train.csv",
        "runtime_env.yaml",
    ]
    stays = [
        ".env",
        "demo/report.html",
        "data/original_data/train.csv",
        "data/finetune/a.jsonl",
        "models/a/weights",
        "results/a.jsonl",
        "sweeps/a.json",
        "wandb/a",
        "tests/test_a.py",
    ]
    for name in travels + stays:
        (project / name).parent.mkdir(parents=True, exist_ok=True)
        (project / name).write_text("x")
    (project / ".gitignore").write_text(read(".gitignore"))
    create_package(
        str(project),
        tmp_path / "job.zip",
        include_gitignore=True,
        excludes=load("runtime_env.yaml")["excludes"],
        logger=logging.getLogger("quiet"),
    )
    with zipfile.ZipFile(tmp_path / "job.zip") as package:
        assert sorted(name for name in package.namelist() if not name.endswith("/")) == sorted([*travels, ".gitignore"])


def test_the_kubernetes_job_has_the_fields_that_kuberay_knows():
    job = load("kuberay/rayjob.yaml")
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    spec = job["spec"]
    assert set(spec) <= {
        *(
            "entrypoint",
            "entrypointNumCpus",
            "entrypointNumGpus",
            "entrypointResources",
            "runtimeEnvYAML",
            "submissionMode",
            "submitterConfig",
            "metadata",
        ),
        *(
            "shutdownAfterJobFinishes",
            "ttlSecondsAfterFinished",
            "activeDeadlineSeconds",
            "backoffLimit",
            "suspend",
            "clusterSelector",
            "rayClusterSpec",
        ),
    }
    assert spec["submissionMode"] in ("K8sJobMode", "HTTPMode", "SidecarMode")
    assert spec["shutdownAfterJobFinishes"] is True
    assert "entrypointNumGpus" not in spec
    cluster = spec["rayClusterSpec"]
    assert set(cluster) <= {
        "rayVersion",
        "enableInTreeAutoscaling",
        "autoscalerOptions",
        "authOptions",
        "headGroupSpec",
        "workerGroupSpecs",
    }
    assert (cluster["rayVersion"], cluster["enableInTreeAutoscaling"], cluster["authOptions"]) == (
        RAY,
        True,
        {"mode": "token"},
    )
    for group in cluster["workerGroupSpecs"]:
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]


def test_every_pod_of_the_kubernetes_job_has_storage_keys_and_no_root():
    cluster = load("kuberay/rayjob.yaml")["spec"]["rayClusterSpec"]
    pods = [
        cluster["headGroupSpec"]["template"]["spec"],
        *(group["template"]["spec"] for group in cluster["workerGroupSpecs"]),
    ]
    for pod in pods:
        (container,) = pod["containers"]
        assert {"name": "NLI_STORAGE_ROOT", "value": "/mnt/nli"} in container["env"]
        assert container["envFrom"] == [{"secretRef": {"name": "nli-keys"}}]
        assert container["securityContext"]["runAsNonRoot"] is True
        mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        assert mounts == {"storage": "/mnt/nli", "shared-memory": "/dev/shm"}
        assert set(mounts) == {volume["name"] for volume in pod["volumes"]}
        assert container["resources"]["limits"] == container["resources"]["requests"]
    assert "nvidia.com/gpu" not in pods[0]["containers"][0]["resources"]["limits"]
    assert all(pod["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1" for pod in pods[1:])
    assert len({pod["containers"][0]["image"] for pod in pods}) == 1


def test_the_kubernetes_job_s_runtime_env_passes_ray_s_validation():
    from ray.runtime_env import RuntimeEnv

    given = yaml.safe_load(load("kuberay/rayjob.yaml")["spec"]["runtimeEnvYAML"])
    assert given["working_dir"] == dict(dockerfile())["WORKDIR"]
    RuntimeEnv(**given | {"working_dir": "."})  # Ray looks for the folder, which only the image has


@pytest.mark.parametrize("name", ["cluster.yaml", "kuberay/rayjob.yaml", "runtime_env.yaml", "Dockerfile"])
def test_commands_in_these_files_name_jobs_and_configs_that_exist(name):
    text = read(name)
    for job in re.findall(r"python -m ray_jobs\.(\w+)", text):
        assert (ROOT / "ray_jobs" / f"{job}.py").exists(), job
    for config in re.findall(r"--config (\S+\.py)", text):
        assert (ROOT / config).exists(), config


def dockerfile():
    """Instructions and their arguments, continued lines joined."""
    joined = re.sub(r"\\\n", " ", re.sub(r"^\s*#.*\n", "", read("Dockerfile"), flags=re.MULTILINE))
    return [tuple(line.split(None, 1)) for line in joined.splitlines() if line.strip()]


def test_the_image_is_built_on_ray_s_own_of_the_pinned_version_for_gpu_and_cpu():
    instructions = dockerfile()
    assert instructions[0] == ("ARG", f"BASE=rayproject/ray:{RAY}-py312-cu130")
    assert instructions[1] == ("FROM", "${BASE}")
    assert f"BASE=rayproject/ray:{RAY}-py312-cpu --build-arg VARIANT=cpu" in read("Dockerfile")
    install = next(arguments for name, arguments in instructions if name == "RUN" and "pip install" in arguments)
    for part in (
        "constraints=constraints-gpu.txt index=cu130",
        "constraints=constraints.txt index=cpu",
        "grep '^torch==' \"$constraints\"",
    ):
        assert part in install


def test_the_image_runs_as_nobody_special_keeps_weights_in_a_volume_and_checks_its_health():
    instructions = dockerfile()
    assert [arguments for name, arguments in instructions if name == "USER"] == ["ray"]
    assert "HF_HOME=/home/ray/huggingface" in dict(instructions)["ENV"]
    assert ("VOLUME", '["/home/ray/huggingface"]') in instructions
    assert "ray health-check" in dict(instructions)["HEALTHCHECK"]
    assert "NLI_STORAGE_ROOT" not in dict(instructions)["ENV"]


def test_the_image_copies_only_what_the_context_holds():
    allowed = [line[1:] for line in read(".dockerignore").splitlines() if line.startswith("!")]
    for name, arguments in dockerfile():
        if name == "COPY":
            sources = [word for word in arguments.split()[:-1] if not word.startswith("--")]
            assert set(sources) <= set(allowed)
    assert read(".dockerignore").splitlines()[1] == "*"
    assert not any("env" in name for name in allowed)


def test_make_has_the_targets_that_people_and_ci_call():
    shown = subprocess.run(
        ["make", "-n", "demo", "test", "test-faults", "lint"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    for part in (
        "-m nli.sample.server --port 8377 -- ",
        "-m ray_jobs.pipeline --config configs/demo/pipeline.py --base-url http://127.0.0.1:8377",
        'pytest --durations=15 -m "not fault and not slow and not gpu"',
        'pytest --durations=15 -m "(fault or slow) and not gpu"',
        "ruff check",
    ):
        assert part in shown
    ci = ROOT / ".ci" / "run"
    assert ci.stat().st_mode & 0o111
    assert [line for line in ci.read_text().splitlines() if line.startswith("make")] == [
        "make test",
        "make test-faults",
    ]
