"""Llamas with experts: in a ModuleList, as in remote code, or in a module that is called with the router's choices."""

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


class CalledExperts(nn.ModuleList):
    """Called with the router's choices, as the experts of transformers are."""

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        output = torch.zeros_like(hidden_states)
        for number in top_k_index.unique().tolist():
            rows, position = (top_k_index == number).nonzero(as_tuple=True)
            output.index_add_(0, rows, self[number](hidden_states[rows]) * top_k_weights[rows, position, None])
        return output


class CallingExperts(nn.Module):
    """Each token goes to two experts, and none to the last one."""

    def __init__(self, config: ExpertsConfig) -> None:
        super().__init__()
        self.gate = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        self.experts = CalledExperts(LlamaMLP(config) for _ in range(config.num_experts))

    def forward(self, hidden: Tensor) -> Tensor:
        tokens = hidden.flatten(0, 1)
        weights, index = self.gate(tokens)[:, :-1].softmax(dim=1).topk(2, dim=1)
        return self.experts(tokens, index, weights).view_as(hidden)


class CalledConfig(ExpertsConfig):
    model_type = "llama_called_experts"


class ExpertsForCausalLM(LlamaForCausalLM):
    config_class = ExpertsConfig

    def __init__(self, config: ExpertsConfig) -> None:
        super().__init__(config)
        for layer in self.model.layers:
            layer.mlp = RoutedExperts(config)


class CalledForCausalLM(LlamaForCausalLM):
    config_class = CalledConfig

    def __init__(self, config: CalledConfig) -> None:
        super().__init__(config)
        for layer in self.model.layers:
            layer.mlp = CallingExperts(config)


AutoConfig.register(CalledConfig.model_type, CalledConfig)
AutoModelForCausalLM.register(CalledConfig, CalledForCausalLM)
AutoConfig.register(ExpertsConfig.model_type, ExpertsConfig)
AutoModelForCausalLM.register(ExpertsConfig, ExpertsForCausalLM)
