"""Generation with vLLM, where it is installed and there is a GPU. Imported on use; the pipeline does not need it.

vLLM gets token ids, so the chat template and its tokens are the very ones of the torch back end, and a seed for each
row. Its kernels are others: answers of the two back ends agree in distribution, not token for token.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, GenerationConfig

from springhead.errors import BadInput
from springhead.llm import model_folder
from springhead.llm.generation import Answer, Conversation, Decoding, Key, prompt_ids


class VllmEngine:
    """An engine of `springhead.llm.answers`."""

    def __init__(self, folder: Path, decoding: Decoding, **settings: Any) -> None:
        """Load a model folder into vLLM.

        Args:
            folder: checked first, as for the torch back end.
            decoding: how to decode; `batch_rows` is vLLM's own business.
            **settings: further arguments of `vllm.LLM`, such as tensor_parallel_size or gpu_memory_utilization.

        Raises:
            BadInput: vLLM is not installed, there is no GPU, or the folder is not a safe model.
        """
        model_folder.check(folder)
        try:
            from vllm import LLM, SamplingParams
        except ImportError as error:
            raise BadInput("backend vllm: vLLM is not installed (pip install vllm); use backend torch") from error
        if not torch.cuda.is_available():
            raise BadInput("backend vllm: torch finds no GPU; use backend torch")
        self._decoding, self._params = decoding, SamplingParams
        self._tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        self._ends = [int(self._tokenizer.eos_token_id)]
        if (folder / "generation_config.json").is_file():
            listed = GenerationConfig.from_pretrained(folder, local_files_only=True).eos_token_id
            self._ends += [int(t) for t in (listed if isinstance(listed, list) else [listed]) if t is not None]
        # Safetensors only, no code of the folder's, and no sampling defaults of the model's over the asked ones.
        self._llm = LLM(
            model=str(folder),
            trust_remote_code=False,
            load_format="safetensors",
            generation_config="vllm",
            seed=decoding.seed,
            **settings,
        )

    def __call__(self, conversations: Sequence[Conversation], keys: Sequence[Key]) -> list[Answer]:
        """Answer conversations."""
        prompts = [{"prompt_token_ids": prompt_ids(self._tokenizer, one)} for one in conversations]
        outputs = self._llm.generate(prompts, [self._params(**self.sampling(key)) for key in keys], use_tqdm=False)
        return [self.read(output.outputs[0]) for output in outputs]

    def sampling(self, key: Key) -> dict[str, Any]:
        """The arguments of vLLM's `SamplingParams` for one row."""
        decoding = self._decoding
        seed = int.from_bytes(hashlib.sha256(f"{decoding.seed}/{key}".encode()).digest()[:4], "big")
        return {
            "temperature": decoding.temperature,
            "top_p": decoding.top_p,
            "top_k": decoding.top_k or -1,
            "max_tokens": decoding.max_new_tokens,
            "stop": list(decoding.stop),
            "stop_token_ids": sorted(set(self._ends)),
            "seed": seed,
            "skip_special_tokens": True,
        }

    def read(self, output: Any) -> Answer:
        """One completion of vLLM's as ours: without end sign."""
        ids = [int(token) for token in output.token_ids]
        ended = bool(ids) and ids[-1] in self._ends
        finish = "end" if ended else "length" if output.finish_reason == "length" else "stop"
        return Answer(ids[:-1] if ended else ids, str(output.text).strip(), finish)  # type: ignore[arg-type]
