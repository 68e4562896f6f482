"""The weights of a VAR and its tokenizer as the native sampling loop takes them (csrc/sampling_loop.h)."""

from __future__ import annotations

import os
from collections.abc import Iterator

import torch
from torch import nn

from var_fast.engine.file_pages import FilePages
from var_fast.errors import UserError
from var_fast.models import VAR
from var_fast.models.autoencoder import AttnBlock, Decoder, ResnetBlock
from var_fast.models.block import MAX_LOG_SCALE
from var_fast.models.phi import Phi

FEWEST_CHANNELS = 32  # of a convolution that goes by Winograd's way: fewer are less than one of its groups
PACKED_FOR_ROWS = 256  # a hint for oneDNN's choice of layout; every number from 8 on gives the same


def native_model(var: VAR, dtype: torch.dtype):
    """A `_C.Model` for `dtype` (float32, bfloat16, float16) on the model's device.

    float32 weights are shared with `var`, not copied. Of half types there is one copy of what enters the large products
    (the blocks' four, decoder), and on CUDA of the head and the modulations; the rest stays in float32 and shared. A
    CPU without products of the half type (AVX512-BF16 and AMX are the ones used) computes in float32: it keeps only
    the weights of the blocks' products in the half type, half the memory to hold and to read, and shares the decoder's.
    """
    from var_fast import _C

    packer = _Packer(dtype, var.lvl_1L.device)
    quantize = var.vae_quant_proxy[0]
    attention = var.blocks[0].attn
    model = _C.Model()
    model.dtype = packer.computes_in
    model.patch_nums = list(var.patch_nums)
    model.C, model.H, model.V, model.Cvae = var.C, var.num_heads, var.V, var.Cvae
    model.hidden = var.blocks[0].ffn.fc1.out_features
    model.eps, model.softmax_scale = var.head_nm.ln_wo_grad.eps, attention.scale
    model.one_launch_rows = _one_launch_rows()

    with torch.no_grad():
        model.class_embedding = _float(var.class_emb.weight)
        model.position_1LC = _float(var.lvl_embed(var.lvl_1L) + var.pos_1LC)
        model.start_1lC = _float(var.pos_start) + model.position_1LC[:, : var.first_l]
        model.codebook_VC = _float(quantize.embedding.weight)
        model.word_embedding = packer.float_linear(var.word_embed)
        model.head_modulation = packer.float_out(var.head_nm.ada_lin[-1])
        model.head = packer.float_out(var.head)
        shared = var.blocks[0].shared_aln
        if shared:
            model.shared_modulation = packer.float_out(var.shared_ada_lin[-1])
        blocks = []
        for block in var.blocks:
            weights = _C.BlockWeights()
            if shared:
                weights.shared_offset_6C = _float(block.ada_gss).reshape(-1)
            else:
                weights.modulation = packer.float_out(block.ada_lin[-1])
            attn = block.attn
            bias = torch.cat((attn.q_bias, attn.zero_k_bias, attn.v_bias))
            weights.qkv = packer.linear(attn.mat_qkv.weight, bias)
            weights.proj = packer.linear(attn.proj.weight, attn.proj.bias)
            weights.fc1 = packer.linear(block.ffn.fc1.weight, block.ffn.fc1.bias)
            weights.fc2 = packer.linear(block.ffn.fc2.weight, block.ffn.fc2.bias)
            if attn.attn_l2_norm:
                weights.scale_H = _float(attn.scale_mul_1H11.clamp_max(MAX_LOG_SCALE).exp()).view(-1)
            blocks.append(weights)
        model.blocks = blocks
        phis = (quantize._phi(si) for si in range(len(var.patch_nums)))
        model.set_phi([_phi(phi) for phi in phis])
        model.set_decoder(list(packer.decoder(var.vae_proxy[0])))
    return model


def _float(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to(torch.float32).contiguous()


def _phi(layer: nn.Module) -> tuple[torch.Tensor | None, torch.Tensor | None, float]:
    if isinstance(layer, Phi):
        return _float(layer.weight), _float(layer.bias), layer.resi_ratio
    return None, None, 0.0


def _one_launch_rows() -> int:
    """VAR_FAST_ONE_LAUNCH_ROWS; 0 where it is not set, until a GPU has shown from where on it is faster."""
    value = os.environ.get("VAR_FAST_ONE_LAUNCH_ROWS", "0")
    if not value.isdecimal():
        raise UserError(f"VAR_FAST_ONE_LAUNCH_ROWS is {value!r}, expected a number of tokens")
    return int(value)


class _Packer:
    """Layers as `dtype` on `device` wants them."""

    def __init__(self, dtype: torch.dtype, device: torch.device):
        from var_fast import _C

        self._C, self.dtype, self.device = _C, dtype, device
        self.pages = FilePages()
        has_bfloat16 = _C.cpu_isa() in ("avx512_bf16", "amx")
        on_cpu = device.type == "cpu" and dtype == torch.bfloat16 and has_bfloat16
        self.computes_in = dtype if device.type == "cuda" or on_cpu else torch.float32
        self.packs = on_cpu and _onednn_packs_bfloat16()
        self.tiles = on_cpu and _C.cpu_isa() == "amx"
        # With AMX oneDNN's direct convolutions come near the tiles' full rate: over the layers of d16's decoder
        # Winograd's way, its products in tiles too, took 1.04 times their time (0.75 while that CPU was throttled).
        self.winograd = on_cpu and _C.cpu_isa() == "avx512_bf16"

    def float_linear(self, layer: nn.Linear):
        return self._linear(_float(layer.weight), _float(layer.bias))

    def float_out(self, layer: nn.Linear):
        """With results in float32. On CUDA the product takes the half type, but is summed in float32; on a CPU it is
        all float32."""
        if self.device.type == "cpu":
            return self.float_linear(layer)
        return self._linear(self._cast(layer.weight), _float(layer.bias))

    def linear(self, weight: torch.Tensor, bias: torch.Tensor, dtype: torch.dtype | None = None):
        weight_NK = self._cast(weight, dtype or self.dtype)
        if self.tiles:
            return self._in_tiles(weight_NK, _float(bias))
        bias_N = self._cast(bias, self.computes_in)
        if self.packs:
            packed = torch.ops.mkldnn._reorder_linear_weight(weight_NK, PACKED_FOR_ROWS)
            return self._C.Linear(packed, bias_N, self._C.Layout.onednn, len(bias_N))
        return self._linear(weight_NK, bias_N)

    def _in_tiles(self, weight_NK: torch.Tensor, bias_N: torch.Tensor):
        N, K = weight_NK.shape
        packed = torch.empty(self._C.cpu_linear_bf16_packed_bytes(N, K) // 2, dtype=torch.bfloat16)
        self._C.cpu_linear_bf16_pack(weight_NK.data_ptr(), N, K, packed.data_ptr(), torch.get_num_threads())
        return self._C.Linear(packed, bias_N, self._C.Layout.tiles, N)

    def conv(self, weight: torch.Tensor, bias: torch.Tensor, padding: int):
        if self.winograd and weight.shape[2:] == (3, 3) and padding == 1 and min(weight.shape[:2]) >= FEWEST_CHANNELS:
            return self._winograd(weight, bias)
        weight, bias = self._cast(weight), _float(bias) if self.device.type == "cuda" else self._cast(bias)
        if self.computes_in != torch.float32:  # a copy anyway, so one in the layout of the maps
            weight = weight.contiguous(memory_format=torch.channels_last)
        if self.packs:
            weight = torch.ops.aten.mkldnn_reorder_conv2d_weight(weight.to_mkldnn(), [padding] * 2, [1, 1], [1, 1], 1)
        return self._C.Conv(weight, bias, padding, self.packs)

    def _winograd(self, weight: torch.Tensor, bias: torch.Tensor):
        out_channels, in_channels = weight.shape[:2]
        weight_OI33 = _float(weight)
        size = self._C.cpu_conv3x3_bf16_packed_bytes(in_channels, out_channels)
        packed = torch.empty(size // 2, dtype=torch.bfloat16)
        self._C.cpu_conv3x3_bf16_pack(weight_OI33.data_ptr(), in_channels, out_channels, packed.data_ptr())
        self.pages.give_back(weight)
        return self._C.Conv(packed, _float(bias), 1, winograd=out_channels)

    def decoder(self, vae) -> Iterator:
        """The steps of the tokenizer's decoder, in order."""
        yield self._step("conv", convs=[self._layer(vae.post_quant_conv)])
        decoder: Decoder = vae.decoder
        yield self._step("conv", convs=[self._layer(decoder.conv_in)])
        mid = decoder.mid
        for block in (mid.block_1, mid.attn_1, mid.block_2):
            yield from self._block(block)
        for i, level in reversed(list(enumerate(decoder.up))):
            for j, block in enumerate(level.block):
                yield from self._block(block)
                if len(level.attn):
                    yield from self._block(level.attn[j])
            if i > 0:
                conv = level.upsample.conv
                phases = subpixel_weights(conv.weight.detach().float())
                yield self._step("upsample", convs=[self.conv(phases, conv.bias.detach().repeat(4), padding=1)])
        yield self._step("norm_silu", norms=[self._norm(decoder.norm_out)])
        if self.device.type == "cuda":
            taps = self._cast(tap_weights(decoder.conv_out.weight))
            image = self._linear(taps, _float(decoder.conv_out.bias))
            yield self._step("image", linears=[image])
        else:
            yield self._step("conv", convs=[self._layer(decoder.conv_out)])

    def _block(self, block: nn.Module) -> Iterator:
        if isinstance(block, ResnetBlock):
            convs = [self._layer(block.conv1), self._layer(block.conv2)]
            if isinstance(block.nin_shortcut, nn.Conv2d):
                convs.append(self._layer(block.nin_shortcut))
            yield self._step("residual", norms=[self._norm(block.norm1), self._norm(block.norm2)], convs=convs)
        elif isinstance(block, AttnBlock):
            convs = (block.qkv, block.proj_out)
            linears = [self.linear(conv.weight.flatten(1), conv.bias, self.computes_in) for conv in convs]
            yield self._step("attention", norms=[self._norm(block.norm)], linears=linears)

    def _step(self, kind: str, norms=(), convs=(), linears=()):
        kinds = self._C.DecoderStep.Kind
        return self._C.DecoderStep(getattr(kinds, kind), list(norms), list(convs), list(linears))

    def _layer(self, conv: nn.Conv2d):
        return self.conv(conv.weight, conv.bias, conv.padding[0])

    def _norm(self, norm: nn.GroupNorm):
        return self._C.Norm(_float(norm.weight), _float(norm.bias), norm.num_groups, norm.eps)

    def _linear(self, weight_NK, bias_N):
        return self._C.Linear(weight_NK, bias_N, self._C.Layout.plain, weight_NK.shape[0])

    def _cast(self, tensor: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        """To `dtype`, by default the type that is computed in."""
        dtype = dtype or self.computes_in
        cast = tensor.detach().to(dtype).contiguous()
        if dtype != torch.float32 and self.device.type == "cpu":
            self.pages.give_back(tensor)
        return cast


def subpixel_weights(weight_OI33: torch.Tensor) -> torch.Tensor:
    """(4 O, I, 2, 2): a 2x2 convolution for each place (row, column) of an output pixel in its pair, row first, that
    together equal nearest-neighbour doubling and then the 3x3 convolution `weight_OI33` (O, I, 3, 3).

    In an even row the kernel's first row meets one input row, the other two both meet the next; in an odd row the first
    two share one. So with columns.
    """
    sums = weight_OI33.new_tensor([[[1, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]])
    return torch.einsum("aud,bve,oide->aboiuv", sums, sums, weight_OI33).flatten(0, 2)


def tap_weights(weight_OI33: torch.Tensor) -> torch.Tensor:
    """(32, I), row (3 ky + kx) 3 + o: the weights by which an input pixel enters channel o of the output pixel that
    sees it at (ky, kx) of a 3x3 convolution to 3 channels; the last five rows are zero, for the tensor cores' tiles."""
    taps = weight_OI33.detach().permute(2, 3, 0, 1).flatten(0, 2)
    return nn.functional.pad(taps, (0, 0, 0, 32 - len(taps)))


def _onednn_packs_bfloat16() -> bool:
    """Whether this torch and this machine have oneDNN's product with packed bfloat16 weights. The operators are not
    public, so they are tried."""
    try:
        weight = torch.ops.mkldnn._reorder_linear_weight(torch.zeros(16, 16, dtype=torch.bfloat16), PACKED_FOR_ROWS)
        x = torch.zeros(1, 16, dtype=torch.bfloat16)
        torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    except (RuntimeError, AttributeError, NotImplementedError):
        return False
    return hasattr(torch.ops.mkldnn, "_convolution_pointwise_")
