"""A Llama whose MLPs are experts in a ModuleList, as in remote code: each runs on its tokens, if it has any."""

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP


class ExpertsConfig(LlamaConfig):
    model_type = "llama_experts"
    num_experts: int = 12


class RoutedExperts(nn.Module):
    """Each token goes to one expert, and none to the last one."""

    def __init__(self, config: ExpertsConfig) -> None:
        super().__init__()
        self.gate = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        self.experts = nn.ModuleList(LlamaMLP(config) for _ in range(config.num_experts))

    def forward(self, hidden: Tensor) -> Tensor:
        tokens = hidden.flatten(0, 1)
        output = torch.zeros_like(tokens)
        chosen = self.gate(tokens)[:, :-1].argmax(dim=1)
        for number, expert in enumerate(self.experts):
            rows = (chosen == number).nonzero().squeeze(1)
            if len(rows):
                output[rows] = expert(tokens[rows])
        return output.view_as(hidden)


class ExpertsForCausalLM(LlamaForCausalLM):
    config_class = ExpertsConfig

    def __init__(self, config: ExpertsConfig) -> None:
        super().__init__(config)
        for layer in self.model.layers:
            layer.mlp = RoutedExperts(config)


AutoConfig.register(ExpertsConfig.model_type, ExpertsConfig)
AutoModelForCausalLM.register(ExpertsConfig, ExpertsForCausalLM)
