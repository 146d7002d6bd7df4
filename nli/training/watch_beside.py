"""Watching accuracy on a spare GPU while training goes on.

beside = WatchBeside(config, tokenised, use_gpu=True)
beside.submit(step=250, model=trainer.model)     # on rank 0, at an evaluation
beside.collect()                                 # [(250, {"accuracy": 0.906, …})] once it is there

A task of its own loads the base, takes the adapters of that step and answers the rows that `nli.training.watching` would. What is still being answered when a run is
killed is not answered again: the log then has no accuracy for that evaluation.
"""

from nli.models.load import add_lora, load_base
from nli.models.tokenizer import first_line, load_tokenizer
from nli.runtime.config import as_dict
from nli.training.config import TrainConfig
from nli.training.watching import read_watch


class WatchBeside:
    """The tasks that are at work, by their step."""

    def __init__(self, config: TrainConfig, tokenised: str, use_gpu: bool) -> None:
        self.config, self.tokenised, self.use_gpu = config, tokenised, use_gpu
        self.pending: list[tuple[int, object]] = []

    def has_room(self) -> bool:
        """Whether a GPU is spare now, or the config asks for a task whatever is spare."""
        import ray

        if self.config.watch_beside is None:
            return self.use_gpu and ray.available_resources().get("GPU", 0) >= 1
        return self.config.watch_beside

    def submit(self, step: int, model) -> None:
        """Have the adapters as they are now answer the sample."""
        import ray
        from peft import get_peft_model_state_dict
        from safetensors.torch import save

        weights = save(
            {name: tensor.detach().cpu().contiguous() for name, tensor in get_peft_model_state_dict(model).items()}
        )
        # DEFAULT: outside the placement group that the training workers share
        options = {
            "num_cpus": 1,
            "num_gpus": 1 if self.use_gpu else 0,
            "scheduling_strategy": "DEFAULT",
            "max_retries": 1,
        }
        task = ray.remote(answer_sample).options(**options)
        self.pending.append(
            (
                step,
                task.remote(
                    as_dict(self.config), self.tokenised, ray.put(weights), "cuda:0" if self.use_gpu else "cpu"
                ),
            )
        )

    def collect(self, wait: bool = False) -> list[tuple[int, dict[str, float]]]:
        """Figures that are there and were not collected before, with their steps; with `wait`, all of them. A failed task is told, and training goes on."""
        import ray

        found, left = [], []
        for step, reference in self.pending:
            if not wait and not ray.wait([reference], timeout=0)[0]:
                left.append((step, reference))
                continue
            try:
                found.append((step, ray.get(reference)))
            except Exception as error:
                print(f"sft: warning: the accuracy at step {step} is not known: {first_line(error)}", flush=True)
        self.pending = left
        return found


def answer_sample(config: dict, tokenised: str, weights: bytes, device: str) -> dict[str, float]:
    """What the task does: the figures of the sample with these adapters."""
    from peft import set_peft_model_state_dict
    from safetensors.torch import load

    train = TrainConfig(**config)
    watch = read_watch(tokenised, load_tokenizer(train.base_model), train.watch_rows, train.max_length, train.seed)
    model = load_base(train.base_model, train.quantization, train.compute_dtype, device)
    model = add_lora(model, train.lora_rank, train.lora_alpha, train.lora_dropout, train.target_modules)
    set_peft_model_state_dict(model, load(weights))
    return watch.score(watch.answer(model.eval(), 0, 1))
