"""Every function of megatron-core and Megatron-Bridge that is replaced here, or given other parts to work with.

A replacement fits one source only. Each function stands here with the hash of the source that was read when its
replacement was written, once for each line of Megatron (``nemo_aapo/lines.py``). An installed library whose function
reads otherwise is refused, by name, before anything runs: a version number says neither that a function changed nor
that it stayed.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import inspect
import linecache
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from nemo_aapo import lines
from nemo_aapo.errors import DriftError

CORE, BRIDGE = "megatron-core", "megatron-bridge"


@dataclass(frozen=True, slots=True)
class Function:
    """One function, as it is in the library.

    Example:
        ``Function("megatron.core.optimizer.optimizer:FP32Optimizer.step", "5d41402a…", "7b52009b…", "why it is")``
    """

    name: str
    """``module:qualified name``."""
    trtllm: str
    """The digest of its source text (``sha256_of``) in the line ``trtllm``."""
    newest: str
    """The same of the line ``newest``."""
    why: str
    """What is replaced in it, or given to it, and for what reason."""

    @property
    def sha256(self) -> str:
        """The digest of its source text in the line that is installed."""
        return self.newest if lines.installed() is lines.NEWEST else self.trtllm

    @property
    def package(self) -> str:
        """The distribution that it comes from."""
        return BRIDGE if self.name.startswith("megatron.bridge.") else CORE

    def owner(self) -> tuple[Any, str]:
        """The module or class that holds the function, and its name there.

        Raises:
            DriftError: there is no such function.
        """
        module, _, path = self.name.partition(":")
        *classes, name = path.split(".")
        try:
            place: Any = importlib.import_module(module)
            for part in classes:
                place = getattr(place, part)
            getattr(place, name)
        except (ImportError, AttributeError) as error:
            raise DriftError(_refusal(self, f"is gone ({error})")) from error
        return place, name


ON_CPU = (
    Function(
        "megatron.core.models.common.language_module.language_module:LanguageModule.setup_embeddings_and_output_layer",
        "005bdd3315b0611b09dabea160e81a72cb455fc211020af407edf97e57064e35",
        "9cdf2778ee6d8aced25eee66c05c2a1fc5cd3a8c937581e01829ca95391b6678",
        "its sum over the stages that share an embedding calls Tensor.cuda()",
    ),
    Function(
        "megatron.core.models.common.embeddings.rope_utils:_apply_rotary_pos_emb_bshd",
        "2d6f53f0fe6f5352d43f16b920a92ec8562445eb19b6a82555a1e90c79fe0d82",
        "4a54b66e47ae8722278401fdd948138540678e67e2331067685ef94cdc801282",
        "it copies much; the replacement takes few passes over memory",
    ),
    Function(
        "megatron.core.models.common.embeddings.rope_utils:_apply_rotary_pos_emb_thd",
        "45c1da33b8ab68f4e2339fba8cda2d5c3b5dbfdcc9d6fd8d5293ffd6c0b191f7",
        "99798acffbb2e50cbe72e1f595005364c49d49de1969c387dcd4f5b274690b16",
        "it puts angles together in each layer anew, also where each token has its own already (mcore/packing.py)",
    ),
    Function(
        "megatron.core.tensor_parallel.random:CudaRNGStatesTracker.add",
        "e5e9ab39a7c1e085fe0b95cb0ef4e25f5c43e3ad9caf876813ef78e3f52f0eec",
        "e5e9ab39a7c1e085fe0b95cb0ef4e25f5c43e3ad9caf876813ef78e3f52f0eec",
        "it reads CUDA's random number generator",
    ),
    Function(
        "megatron.core.tensor_parallel.random:CudaRNGStatesTracker.fork",
        "6821e1e397253d43b111f5cb8f7feab6301faacf24deaece01416a7c644322d5",
        "6821e1e397253d43b111f5cb8f7feab6301faacf24deaece01416a7c644322d5",
        "it sets CUDA's random number generator",
    ),
    Function(
        "megatron.core.tensor_parallel.random:_get_cuda_rng_state",
        "aa26caaa069c5c4feff0f9f4e69f0f2ab6d6fc7940f71c3a6d0fe9303447d3dc",
        "aa26caaa069c5c4feff0f9f4e69f0f2ab6d6fc7940f71c3a6d0fe9303447d3dc",
        "recomputation reads CUDA's generator",
    ),
    Function(
        "megatron.core.tensor_parallel.random:_set_cuda_rng_state",
        "b179c9d95438b61c1d9b58e8e13cc6534f2ae2f870d991c42438de53829ed398",
        "b179c9d95438b61c1d9b58e8e13cc6534f2ae2f870d991c42438de53829ed398",
        "recomputation sets CUDA's generator",
    ),
    Function(
        "megatron.core.tensor_parallel.layers:LinearWithGradAccumulationAndAsyncCommunication.backward",
        "b50b2ea4a1c9027040516475a8b40a0bd86ddf9e17fcb5c2c56feb3156c3ae3e",
        "0a5b564dd254cb937e31c7707f240c80980b7b588f2b3bf8e503355a5d2cc5e5",
        "it is given a CPU's kernel in place of apex's, which adds weight gradients within the product",
    ),
    Function(
        "megatron.core.optimizer.clip_grads:clip_grad_by_total_norm_fp32",
        "8edb9da5365045a5d1c21c4ca81697412bbdbab725209db8df00dc90d03363e1",
        "cf07b488fb76a8ae90ba0809d1fbd36e05dcccf24b4644af1621a8b616c01784",
        "it asserts that gradients are CUDA's",
    ),
    Function(
        "megatron.core.optimizer.clip_grads:get_grad_norm_fp32",
        "7fa2ba2493d43f1d3693ee62b5558ffccf3b0b2976bf746613187ff3bbc8b86f",
        "810944e99b1e435d5fa6406953369fb2b477719a0fe3c4361cf1b783b3d26286",
        "it is given a norm that is right at any size, also where TransformerEngine or apex is installed without a GPU",
    ),
    Function(
        "megatron.core.optimizer.optimizer:_multi_tensor_copy_this_to_that",
        "2788b0572db3ae06792290baeaf36b75a6ab33ab539a019e88817597adcac75c",
        "2788b0572db3ae06792290baeaf36b75a6ab33ab539a019e88817597adcac75c",
        "it is given mcore's own copy, where TransformerEngine or apex is installed without a GPU",
    ),
    Function(
        "megatron.core.optimizer:_get_megatron_optimizer_based_on_param_groups",
        "34bc6add4c25e9093fa33ca4c8dc1c7b9eb173180b6f8adfd60f1988231f0020",
        "6a29af7290de3f2dbc8aa3e4aa17d98de0de5fbf010923df552845ad96d387ea",
        "it is told to take torch's Adam, where TransformerEngine or apex is installed without a GPU",
    ),
    Function(
        "megatron.core.optimizer.distrib_optimizer:DistributedOptimizer.__init__",
        "3275f640fc1b7377182f3907efc162ae4df4ad14c267417c78041d53b9fb2adf",
        "27507ad691f25754a595e3a4c870ef3b3c92c657123710840c0c10c34ed9bfc2",
        "it sorts parameters by type names of CUDA, which they are given meanwhile",
    ),
    Function(
        "megatron.core.optimizer.distrib_optimizer:DistributedOptimizer._build_model_and_main_param_groups",
        "1b9f0ec06718f817fe8ce6b8bc62ae2a4e096a3cf599a19511ce9d9355f3b7f8",
        "3fce9be2b6d1d143559761811d30afc63d63c6405dbead686f30996997096951",
        "it sorts parameters by type names of CUDA, which they are given meanwhile",
    ),
    Function(
        "megatron.core.optimizer.distrib_optimizer:DistributedOptimizer.get_parameter_state_dp_zero",
        "812c52ea4568b0ffae6132290b6bffe247fa0c44e42835be3e1ae55cbadd838b",
        "14d11a75ad9ccd8bed9b8df6a27f8d8340ee3e387da8257c58a6b027fff84608",
        "it gathers the state by Tensor.cuda(), unless it is told to use gloo",
    ),
    Function(
        "megatron.core.optimizer.distrib_optimizer:DistributedOptimizer._set_main_param_and_optimizer_states",
        "93c254228283b2df0147fe436a2fe5d9e754ab4b7276a96f023be179c737329f",
        "40cab784659711a8e7cdd5a0d84e60de0e1a2fa648316d4d697af83725311b4b",
        "it looks for torch's step count among the tensors that are loaded, where it is not",
    ),
    Function(
        "megatron.core.optimizer.distrib_optimizer:DistributedOptimizer.state_dict",
        "fe621ae6a622b58752df0330a2a30056dda222d73f22dc6bce6a5d1ac2bfa3d8",
        "fe621ae6a622b58752df0330a2a30056dda222d73f22dc6bce6a5d1ac2bfa3d8",
        "it is told that Adam is torch's, where TransformerEngine or apex is installed without a GPU",
    ),
    Function(
        "megatron.core.optimizer.distrib_optimizer:DistributedOptimizer.load_state_dict",
        "15f257b4c4f9a7ef6d6660e829de088d39997615c2a4e52ec5e7e1306b465f04",
        "7e5f988b86b485012fe3031b4960e8624d3b6e8db12a49367ffeae5777de029f",
        "it is told that Adam is torch's; and it loads one tensor as the step count of all parameters, which are "
        "given one each afterwards",
    ),
    Function(
        "megatron.core.transformer.moe.token_dispatcher:MoEAlltoAllTokenDispatcher.__init__",
        "dfafd17183db3f0cd29e5248d882efc7ef48330c7a1beb732e565feaf129722d",
        "16b89c6dbec0dc839ca43edb5cda55004112612d1c039b4068a3275418f06060",
        "it makes a CUDA stream, unless there is something in its place",
    ),
    Function(
        "megatron.core.transformer.moe.token_dispatcher:MoEAlltoAllTokenDispatcher._maybe_dtoh_and_synchronize",
        "306811df71072b74a18efdbb0b22229771225b71edff95d5231bf391e2813adb",
        "306811df71072b74a18efdbb0b22229771225b71edff95d5231bf391e2813adb",
        "it copies the numbers of tokens to the host on a CUDA stream; on a CPU they are there",
    ),
    Function(
        "megatron.core.transformer.moe.moe_utils:sort_chunks_by_idxs",
        "0d65adf03323f702e5cc4e08cc25eb041626be958e618df60471b2cf6b5d984b",
        "0d65adf03323f702e5cc4e08cc25eb041626be958e618df60471b2cf6b5d984b",
        "it cuts tokens up and joins them again also where they lie in order",
    ),
    Function(
        "megatron.core.transformer.moe.experts:SequentialMLP.forward",
        "2f6a645f4f9ce7d71b0a6910ec51d9d9fa96fe3086da2b755cc444b845320b62",
        "2f6a645f4f9ce7d71b0a6910ec51d9d9fa96fe3086da2b755cc444b845320b62",
        "it calls experts one after the other; the replacement is one autograd function (mcore/experts/grouped.py)",
    ),
    Function(
        "megatron.core.transformer.moe.moe_utils:RouterGatingLinearFunction.forward",
        "dcba4f9f02b30a3662d27126739a667cbaf345a82443d1a0cff5792491b95580",
        "dcba4f9f02b30a3662d27126739a667cbaf345a82443d1a0cff5792491b95580",
        "it asks for TransformerEngine's product by a name that nobody has defined without it",
    ),
    Function(
        "megatron.core.transformer.moe.moe_utils:RouterGatingLinearFunction.backward",
        "222f6d592730bd2833e8eee669fc55412b40f923a810e9c2b65f707784db4bbf",
        "222f6d592730bd2833e8eee669fc55412b40f923a810e9c2b65f707784db4bbf",
        "it asks for TransformerEngine's product by a name that nobody has defined without it",
    ),
)
"""Checked where there is no GPU: with one, these run as they are."""

EVERYWHERE = (
    Function(
        "megatron.core.models.gpt.gpt_model:GPTModel._postprocess",
        "a5f7de0bfb1cad97b680b964bdea46140959571a1b74a68651fefe5a276363df",
        "41700c5f809c197c24d995bcb23b1638edc799c3542fec904567f32ce5af8f19",
        "told that the last stage is none, it must return hidden states in place of logits",
    ),
)
"""Functions of mcore that are checked on every machine."""

OF_BRIDGE = (
    Function(
        "megatron.bridge.models.conversion.param_mapping:MegatronParamMapping.scatter_to_tp_ranks",
        "3d4d0ac20bd3be95f7f1765eca22caefc0bf8446893645bcb7517713d66b968a",
        "c6e96c9e5d48bb144086e54a50ad6e45b60b391fa099e10acd8a4f49be8c15bd",
        "gloo's scatter misreads tensors that are not contiguous, without an error",
    ),
    Function(
        "megatron.bridge.models.conversion.model_bridge:_megatron_local_name_to_global",
        "c8b4945fdbf48fbb25c7dff6a79691b7589fac37104b6ff63f387dcaccd5e162",
        "52e3221c8a1b8d95fcc86fd75b299c4f5d809c9e14d4dd951bf6197d597cf59b",
        "of experts that are modules of their own it leaves the numbers as they are on each rank",
    ),
    Function(
        "megatron.bridge.models.conversion.param_mapping:MegatronParamMapping.gather_from_ep_ranks",
        "f12c0ea79d5f514ef456aaf9a1ed57209fd8d7fb231e908dfc56a24bc320ecfc",
        "517d106b7e85a0340a73b25777b9c0b15611534b91927f7b9c3405d93f96f7cd",
        "it finds no number in the names of experts that are modules of their own",
    ),
)
"""Checked on every machine as Megatron-Bridge is imported. Those of the line ``newest`` are right and stay."""

OF_OLMOE = (
    Function(
        "megatron.bridge.models.olmoe.olmoe_bridge:OlMoEBridge.mapping_registry",
        "eabac2cb6a8c31d1ce9fbd4d57afc34269afdf2aced9e938da15c1ad7207f5b0",
        "eabac2cb6a8c31d1ce9fbd4d57afc34269afdf2aced9e938da15c1ad7207f5b0",
        "it has no place for experts that are modules of their own, as they are without TransformerEngine",
    ),
)
"""Checked on every machine as the Bridge's map of OLMoE is imported."""

OF_LORA = (
    Function(
        "megatron.bridge.peft.utils:get_adapter_attributes_from_linear",
        "a36af8a5e7e5c68d10b2817750c3583ef1a2a0397436bc902de6cff0d023f943",
        "15fb2eeae5fa944439424a3226d28f79b3b486b0cc6205f5b0083d4b28a549f2",
        "it takes mcore's mocks of TransformerEngine's classes for real ones, where that is absent",
    ),
)
"""Checked on every machine as the Bridge's LoRA is imported."""


def check(functions: Iterable[Function]) -> None:
    """Compare the installed functions with those that the replacements were written for.

    Raises:
        DriftError: one of them is another; names it, its package's version, and what to do.
    """
    for function in functions:
        place, name = function.owner()
        if (found := sha256_of(getattr(place, name))) != function.sha256:
            raise DriftError(_refusal(function, f"has another source than the one known here (its sha256 is {found})"))


def sha256_of(function: Callable[..., Any]) -> str:
    """Of a Python function's source text, with its decorators; empty where there is none to read.

    As ``inspect.getsource``, which takes ten times as long: it looks through all modules for the function's first.
    """
    code = getattr(inspect.unwrap(function), "__code__", None)
    lines = linecache.getlines(code.co_filename)[code.co_firstlineno - 1 :] if code else []
    return hashlib.sha256("".join(inspect.getblock(lines)).encode()).hexdigest() if lines else ""


def _refusal(function: Function, problem: str) -> str:
    lists = " and ".join(f"requirements/{name}" for name in lines.installed().requirements)
    return (
        f"{function.package} {importlib.metadata.version(function.package)}: {function.name} {problem}, and nemo_aapo "
        f"changes it or goes by how it is: {function.why}. Install the versions in {lists}; or read the new source, "
        "mend the change in nemo_aapo/mcore, and put the new hash into nemo_aapo/mcore/replaced.py"
    )
