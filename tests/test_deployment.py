"""What is deployed draws the pictures of what was trained: merged, with fused attention, and on OpenVINO."""

import sys
from importlib import import_module

import pytest
import torch
from conftest import moved
from diffusers.configuration_utils import FrozenDict

from lora_distill import cpu_runtime
from lora_distill.adapters import UNetInRole, adapter_parameters, base_weights, plain_copy
from lora_distill.cpu_runtime import OpenvinoDecoder, OpenvinoUNet
from lora_distill.deployment import deployed, deployments
from lora_distill.errors import RunError
from lora_distill.fingerprint import fingerprint
from lora_distill.judge.timing import runtime, threads
from lora_distill.pipeline import decode_latents, encode_prompts, load_pipeline, with_unet
from lora_distill.sampling import Sampler, initial_noise, sample

GUIDED, SINGLE = Sampler(3, 3.0), Sampler(3)


@pytest.fixture(scope="module")
def graphs(tmp_path_factory):
    """Made once for all tests here, as a run keeps them for all of its notebooks."""
    return tmp_path_factory.mktemp("graphs")


@pytest.fixture(scope="module")
def trained():
    pipe = load_pipeline("bundled")
    moved(pipe.unet, "student", rank=2, alpha=4)
    return pipe


def drawn(pipe, sampler=GUIDED, count=2, resolution=64):
    embeds = encode_prompts(pipe, ["a lion", "an owl", "a bus"][:count]), encode_prompts(pipe, [""])
    return sample(pipe, sampler, initial_noise(pipe, count, 0, resolution), *embeds)


@pytest.mark.parametrize("on_openvino", [False, True])
@pytest.mark.parametrize("adapter", [None, "student"])
def test_what_is_deployed_draws_the_same_images(trained, graphs, adapter, on_openvino):
    ours = drawn(trained, Sampler(3, 3.0, adapter=adapter))
    assert (drawn(deployed(trained, adapter, graphs if on_openvino else None)) - ours).abs().max() <= 1e-4
    assert (drawn(trained, Sampler(3, 3.0, adapter="student")) - drawn(trained)).abs().max() > 0.1, "the adapter counts"


def test_one_graph_serves_every_batch_and_resolution(trained, graphs):
    on_openvino = deployed(trained, graphs=graphs)
    for count, resolution in [(1, 64), (3, 64), (2, 96), (2, 72), (1, 80)]:
        ours, theirs = (drawn(pipe, SINGLE, count, resolution) for pipe in (trained, on_openvino))
        assert (ours - theirs).abs().max() <= 1e-4


def test_the_decoder_on_openvino_draws_the_same_pixels(trained, graphs):
    latents = drawn(trained)
    ours, theirs = (decode_latents(pipe, latents).astype(int) for pipe in (trained, deployed(trained, graphs=graphs)))
    assert abs(ours - theirs).max() <= 1, "a grey level, where rounding falls to the other side"


def test_w0_and_students_share_one_graph_that_holds_no_weights(trained, graphs):
    deployed(trained, "student", graphs)
    deployed(trained, graphs=graphs)
    assert len(list(graphs.glob("unet-graph-*"))) == len(list(graphs.glob("decoder-graph-*"))) == 1
    weights = sum(p.nbytes for p in plain_copy(trained.unet).parameters())
    assert sum(file.stat().st_size for file in graphs.iterdir()) < weights / 20


def test_all_that_is_deployed_of_a_pipeline_shares_one_decoder(trained, graphs):
    assert deployed(trained, "student", graphs).vae is deployed(trained, graphs=graphs).vae
    assert deployed(load_pipeline("bundled"), graphs=graphs).vae is not deployed(trained, graphs=graphs).vae


def test_layers_that_are_configured_otherwise_have_another_graph(unet, tmp_path):
    half = type(unet).from_config(unet.config, resnet_out_scale_factor=2.0).eval()
    half.load_state_dict(unet.state_dict())
    x, t, embeds = torch.randn(2, 4, 8, 8), torch.tensor(19), torch.randn(2, 5, 8)
    for each in (unet.eval(), half):
        with torch.no_grad():
            assert (OpenvinoUNet(each, tmp_path)(x, t, embeds).sample - each(x, t, embeds).sample).abs().max() <= 1e-5
    assert len(list(tmp_path.iterdir())) == 2


def test_a_damaged_graph_is_made_again(trained, graphs):
    deployed(trained, graphs=graphs)
    decoder = next(graphs.glob("decoder-graph-*"))
    decoder.write_bytes(decoder.read_bytes()[:-100])
    with pytest.warns(UserWarning, match=r"decoder-graph-\w+\.safetensors.*made again"):
        assert drawn(deployed(load_pipeline("bundled"), graphs=graphs)).isfinite().all()


def test_it_runs_with_as_many_threads_as_pytorch(trained, graphs):
    on_openvino, plans = deployed(trained, graphs=graphs), []
    plan = on_openvino.unet.planned
    on_openvino.unet.planned = lambda *sizes: plans.append(plan(*sizes)) or plans[-1]
    for count in (1, 2):
        with threads(count):
            drawn(on_openvino)
            assert plans[-1][0].get_compiled_model().get_property("INFERENCE_NUM_THREADS") == count
    assert runtime(on_openvino.unet) == "OpenVINO"


def test_nobody_is_told_that_it_runs(trained, graphs):
    drawn(deployed(trained, graphs=graphs))
    assert sys.modules["openvino_telemetry"] is None and "stub" in import_module("openvino.tools.ovc.main").tm.__name__


def test_a_large_batch_runs_in_equal_parts_side_by_side(trained, graphs):
    in_pytorch, on_openvino = deployed(trained), deployed(trained, graphs=graphs)
    noise = torch.randn(34, 4, 8, 8)
    embeds, t = torch.randn(34, 5, trained.unet.config.cross_attention_dim), torch.tensor(500)
    for count in (1, 2, 3):  # with two threads in two parts, with three, of which 34 has no third, in one
        with threads(count), torch.no_grad():
            ours, theirs = (pipe.unet(noise, t, embeds).sample for pipe in (in_pytorch, on_openvino))
        assert (ours - theirs).abs().max() <= 1e-4


def test_inputs_that_do_not_lie_row_by_row_in_memory_are_read_right(trained, graphs):
    in_pytorch, on_openvino = deployed(trained), deployed(trained, graphs=graphs)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(3, 8, 8, 4, generator=generator).permute(0, 3, 1, 2)
    embeds = torch.randn(1, 5, trained.unet.config.cross_attention_dim, generator=generator).expand(3, -1, -1)
    with torch.no_grad():
        ours, theirs = (pipe.unet(noise, torch.tensor(500), embeds).sample for pipe in (in_pytorch, on_openvino))
    assert (ours - theirs).abs().max() <= 1e-4


def test_a_forward_leaves_inputs_and_earlier_outputs_as_they_were(trained, graphs):
    unet, generator = deployed(trained, graphs=graphs).unet, torch.Generator().manual_seed(0)
    noise = torch.randn(2, 4, 8, 8, generator=generator)
    embeds = torch.randn(2, 5, trained.unet.config.cross_attention_dim, generator=generator)
    given, earlier = (noise.clone(), embeds.clone()), unet(noise, torch.tensor(500), embeds).sample
    kept = earlier.clone()
    later = unet(noise, torch.tensor(20), embeds).sample
    assert torch.equal(noise, given[0]) and torch.equal(embeds, given[1])
    assert torch.equal(earlier, kept) and not torch.equal(earlier, later)


def test_no_constant_of_a_graph_depends_on_a_weight(unet):
    example = {"sample": torch.zeros(2, 4, 9, 9), "timestep": torch.tensor(0.0),
               "encoder_hidden_states": torch.zeros(2, 7, 8)}  # fmt: skip
    graphs = [cpu_runtime._converted(unet, example, seed) for seed in (0, 1)]
    assert graphs[0][1] == graphs[1][1] and len(graphs[0][1]) < 2000


def test_a_graph_without_one_of_its_weights_is_refused(unet, tmp_path):
    ready = OpenvinoUNet(unet.eval(), tmp_path)
    graph, module = ready.planned.__wrapped__.args
    weights = module.state_dict()
    weights.pop("conv_in.weight")
    with pytest.raises(RunError, match=r"OpenVINO's graph lacks conv_in.weight"):
        cpu_runtime._with_weights(graph, weights, ["sample", "timestep", "encoder_hidden_states"])


def test_several_timesteps_are_refused(unet, tmp_path):
    with pytest.raises(ValueError, match="timestep: this UNet takes one for the whole batch"):
        OpenvinoUNet(unet.eval(), tmp_path)(torch.zeros(2, 4, 8, 8), torch.zeros(2), torch.zeros(2, 5, 8))


class Doubled(torch.nn.Linear):
    """Computes with twice its weights, which are no longer found in a graph that holds their product."""

    def forward(self, input):
        return torch.nn.functional.linear(input, 2 * self.weight, self.bias)


def test_a_graph_that_computes_something_else_is_refused(tmp_path):
    vae = torch.nn.Module()
    vae.config = FrozenDict(latent_channels=4)
    vae.post_quant_conv, vae.decoder = None, Doubled(8, 8)
    with pytest.raises(RunError, match=r"OpenVINO's output differs from PyTorch's by .*; take the pipeline as it is"):
        OpenvinoDecoder(vae, tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_weights_decide_the_fingerprint(trained, graphs):
    base, student = deployed(trained, graphs=graphs), deployed(trained, "student", graphs)
    assert fingerprint(base) == fingerprint(deployed(trained, graphs=graphs)) != fingerprint(student)


def test_a_unet_that_takes_w_as_an_input_is_refused(trained):
    lcm = with_unet(trained, plain_copy(trained.unet, time_cond_proj_dim=256))
    with pytest.raises(ValueError, match="takes the guidance scale as an input is not deployed"):
        deployed(lcm)


def test_an_adapter_that_is_not_there_is_refused(trained):
    with pytest.raises(ValueError, match=r"no adapter 'studnet' on this UNet; it carries \['student'\]"):
        deployed(trained, "studnet")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_in_pytorch(graphs, dtype):
    pipe = deployed(load_pipeline("bundled", dtype=dtype), graphs=graphs)
    assert runtime(pipe.unet) == "PyTorch" and drawn(pipe).isfinite().all()


def difference(pipe, other, sampler=SINGLE):
    """Between the latents of two pipelines, root mean square."""
    return (drawn(pipe, sampler) - drawn(other)).square().mean().sqrt().item()


def small_update(dtype):
    """A pipeline whose student differs from W0 by updates of 0.0003, as those of trained adapters do."""
    pipe = load_pipeline("bundled", dtype=dtype)
    for p in moved(pipe.unet, "student", rank=2, alpha=4):
        p.data *= 0.05
    return pipe


def test_an_update_that_bfloat16_cannot_hold_is_not_lost_when_deployed():
    pipe, student = small_update(torch.bfloat16), Sampler(3, 3.0, adapter="student")
    with pytest.warns(UserWarning, match=r"adapter 'student' is not folded into W0 but runs beside it: .*bfloat16"):
        ready = deployed(pipe, "student")
    assert torch.equal(drawn(ready), drawn(pipe, student)), "the very student that was trained"
    assert difference(pipe, pipe, student) > 0.01, "the adapter counts"
    assert {p.data_ptr() for p in ready.unet.parameters()} == {p.data_ptr() for p in pipe.unet.parameters()}
    assert fingerprint(ready) != fingerprint(pipe)


def test_what_is_timed_is_folded_whatever_its_values():
    pipe = small_update(torch.bfloat16)
    assert not isinstance(deployed(pipe, "student", for_timing=True).unet, UNetInRole)


def test_students_that_run_beside_w0_have_fingerprints_of_their_own():
    pipe = small_update(torch.bfloat16)
    moved(pipe.unet, "other", rank=2, alpha=4, seed=9)
    with pytest.warns(UserWarning, match="not folded"):
        ready = deployed(pipe, "student")
    other = with_unet(pipe, UNetInRole(pipe.unet, "other"))
    prints = {fingerprint(each) for each in (pipe, ready, other)}
    with torch.no_grad():
        adapter_parameters(pipe.unet, "student")[0].add_(1)
    assert len(prints | {fingerprint(ready)}) == 4 and fingerprint(other) in prints


def test_an_update_that_float16_can_hold_is_folded():
    pipe = small_update(torch.float16)
    ready, student = deployed(pipe, "student"), Sampler(3, 3.0, adapter="student")
    exact = small_update(torch.float32)
    noise = difference(exact, pipe) + 1e-3  # of float16 itself, in the teacher
    assert (drawn(ready) - drawn(pipe, student)).square().mean().sqrt() < 3 * noise


def test_what_is_deployed_without_an_adapter_shares_the_weights_of_w0(trained):
    ready = deployed(trained)
    w0 = {p.data_ptr() for p in base_weights(trained.unet).values()}
    own = [name for name, p in ready.unet.named_parameters() if p.data_ptr() not in w0]
    assert own and all("to_qkv" in name or "to_kv" in name for name in own)


def test_the_last_deployed_pipelines_are_remembered_and_a_full_lcm_is_its_own(trained, tmp_path):
    half = with_unet(trained, plain_copy(trained.unet).bfloat16())  # stays in PyTorch: no graph is made
    deploy = deployments(tmp_path, kept=1)
    first = deploy(half)
    assert deploy(half, None) is first and first.unet is not half.unet
    lcm = with_unet(trained, plain_copy(trained.unet, time_cond_proj_dim=8))
    assert deploy(lcm) is lcm and deploy(half) is first
    other = with_unet(trained, half.unet)
    assert deploy(other) is not first and deploy(half) is not first, "only one is kept"
