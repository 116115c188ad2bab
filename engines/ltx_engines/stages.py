"""The stages of each model family, and the one table of tensors that everybody reads.

ONNX axes, TensorRT profiles, the runtime's checks and Triton's configuration all derive from these
tables. An axis is a size when every engine of the model has the same, else a name; two axes of one
stage with the same name always have the same size.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

Axis = int | str

FLOAT = "float"
"""The element type of the stage's own precision: float32, float16 or bfloat16."""

STAGES = ("text_encoder", "transformer", "vae_encoder", "vae_decoder")

OPTIONAL = ("latent_upsampler",)
"""Stages whose weights are in a file of their own, which a pipeline may do without."""

DECODER, STREAM = "vae_decoder", "vae_decoder_stream"
"""The VAE's decoder, and once more, from the same weights: for a clip that it is given a few latent
frames at a time."""

DECODERS = (DECODER, STREAM)

SAMPLER_STEP = "sampler_step"
"""Guidance and one step of the sampler: no model's, made where the transformer's engine is."""

BRANCHES = ("uncond", "text", "perturbed")
"""Of guidance, in the order in which they are the transformer's batch."""

COEFFICIENTS = (
    "guidance_scale",
    "stg_scale",
    "rescaling_scale",
    "cfg_star_rescale",
    "latents",
    "velocity",
    "previous",
    "noise",
    "sigma",
)
"""What a sampler step reads beside tensors, in this order; 0 switches the two rescalings off."""


@dataclass(frozen=True, slots=True)
class Tensor:
    """One input or output. `dtype` is FLOAT or the name of a fixed type."""

    name: str
    dtype: str
    axes: tuple[Axis, ...]


@dataclass(frozen=True, slots=True)
class Stage:
    """One engine's contract."""

    name: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]

    def tensors(self) -> Iterator[Tensor]:
        yield from self.inputs
        yield from self.outputs


@dataclass(frozen=True, slots=True)
class NoiseInput:
    """Noise that a VAE 0.9.1 decoder adds inside block `block`: `maps` images of that level."""

    block: int
    maps: int

    @property
    def name(self) -> str:
        return f"noise_{self.block}"


@dataclass(frozen=True, slots=True)
class Kept:
    """What a convolution of the decoder keeps of a stream: two frames in so many channels, in
    `scale` times the latents' rows and columns."""

    channels: int
    scale: int


@dataclass(frozen=True, slots=True)
class Upsampling:
    """What a latent upsampler doubles: rows and columns, frames, or all of them."""

    spatial: bool
    temporal: bool

    def __post_init__(self) -> None:
        if not (self.spatial or self.temporal):
            raise ValueError("an upsampler that doubles nothing")


@dataclass(frozen=True, slots=True)
class Sizes:
    """What of a checkpoint's configuration shows in the tensor tables of LTX-Video.

    `upsampling` is of the upsampler's own file; None where there is no such file.
    """

    in_channels: int
    out_channels: int
    caption_channels: int
    num_layers: int
    latent_channels: int
    timestep_conditioning: bool
    noise_inputs: tuple[NoiseInput, ...] = ()
    kept: tuple[Kept, ...] = ()
    upsampling: Upsampling | None = None


def ltx_video(sizes: Sizes) -> dict[str, Stage]:
    """The stages of LTX-Video by name, in order of use: the base pipeline's, and the upsampler."""
    upsamplers = (_latent_upsampler(sizes, sizes.upsampling),) if sizes.upsampling else ()
    return {
        stage.name: stage
        for stage in (
            _text_encoder(sizes),
            _transformer(sizes),
            *upsamplers,
            _vae_encoder(sizes),
            _vae_decoder(sizes),
            _vae_decoder_stream(sizes),
        )
    }


def sampler_step(channels: int) -> Stage:
    """From the velocities of the branches and the latents to the next latents and `batch`, which
    is what the transformer reads next: as many rows of it as it has branches.

    A branch that was not run is the text's velocity again: their difference is 0, whatever its
    scale. `previous` is the last step's `clean`.
    """

    def tokens(name: str, dtype: str = "float32", batch: int = 1) -> Tensor:
        return Tensor(name, dtype, (batch, "tokens", channels))

    return Stage(
        SAMPLER_STEP,
        inputs=(
            tokens("latents"),
            *(tokens(branch, FLOAT) for branch in BRANCHES),
            tokens("previous"),
            tokens("noise"),
            Tensor("coefficients", "float32", (len(COEFFICIENTS),)),
        ),
        outputs=(
            tokens("next_latents"),
            tokens("clean"),
            tokens("batch", FLOAT, len(BRANCHES)),
        ),
    )


def _text_encoder(sizes: Sizes) -> Stage:
    return Stage(
        "text_encoder",
        inputs=(
            Tensor("input_ids", "int64", ("batch", "text")),
            Tensor("attention_mask", "int64", ("batch", "text")),
        ),
        outputs=(Tensor("prompt_embeds", FLOAT, ("batch", "text", sizes.caption_channels)),),
    )


def _transformer(sizes: Sizes) -> Stage:
    """`timesteps` is 1 (one sigma for the clip) or `tokens` (one each, for conditioning)."""
    return Stage(
        "transformer",
        inputs=(
            Tensor("latents", FLOAT, ("batch", "tokens", sizes.in_channels)),
            Tensor("coords", "float32", ("batch", 3, "tokens")),
            Tensor("timestep", "float32", ("batch", "timesteps")),
            Tensor("prompt_embeds", FLOAT, ("batch", "text", sizes.caption_channels)),
            Tensor("prompt_mask", FLOAT, ("batch", "text")),
            Tensor("skip_layer_mask", FLOAT, (sizes.num_layers, "batch")),
        ),
        outputs=(Tensor("velocity", FLOAT, ("batch", "tokens", sizes.out_channels)),),
    )


def _latents(sizes: Sizes, name: str) -> Tensor:
    grid = ("latent_frames", "latent_height", "latent_width")
    return Tensor(name, FLOAT, ("batch", sizes.latent_channels, *grid))


def _latent_upsampler(sizes: Sizes, upsampling: Upsampling) -> Stage:
    """upsampled_frames = 2 latent_frames - 1, upsampled_height = 2 latent_height, width alike."""
    frames = "upsampled_frames" if upsampling.temporal else "latent_frames"
    sides = "upsampled" if upsampling.spatial else "latent"
    grid = (frames, f"{sides}_height", f"{sides}_width")
    return Stage(
        "latent_upsampler",
        inputs=(_latents(sizes, "latents"),),
        outputs=(Tensor("upsampled", FLOAT, ("batch", sizes.latent_channels, *grid)),),
    )


PIXELS = Tensor("pixels", FLOAT, ("batch", 3, "frames", "height", "width"))
"""Pixels from -1 to 1; frames = 8 (latent_frames - 1) + 1, height = 32 latent_height."""


def _vae_encoder(sizes: Sizes) -> Stage:
    return Stage(
        "vae_encoder",
        inputs=(PIXELS, _latents(sizes, "noise")),
        outputs=(_latents(sizes, "latents"),),
    )


def _vae_decoder(sizes: Sizes) -> Stage:
    return Stage(
        "vae_decoder",
        inputs=(_latents(sizes, "latents"), *_constants(sizes)),
        outputs=(PIXELS,),
    )


def _vae_decoder_stream(sizes: Sizes) -> Stage:
    """`place` is the number of the first of these latent frames, and how many the clip has. What
    it gives as `next_0` and so on, it is given as `past_0` with the latent frames that follow."""
    return Stage(
        STREAM,
        inputs=(
            _latents(sizes, "latents"),
            Tensor("place", "int64", (2,)),
            *_constants(sizes),
            *_kept(sizes, PAST),
        ),
        outputs=(
            Tensor("pixels", FLOAT, ("batch", 3, "stream_frames", "height", "width")),
            *_kept(sizes, NEXT),
        ),
    )


PAST, NEXT = "past_", "next_"
"""How the names of what a stream keeps begin: what goes in, what comes out."""


def _kept(sizes: Sizes, prefix: str) -> Iterator[Tensor]:
    for index, kept in enumerate(sizes.kept):
        finer = "" if kept.scale == 1 else f"_x{kept.scale}"
        grid = (f"latent_height{finer}", f"latent_width{finer}")
        yield Tensor(f"{prefix}{index}", FLOAT, ("batch", kept.channels, 2, *grid))


def _constants(sizes: Sizes) -> Iterator[Tensor]:
    """What a decoder is given the same of for all frames of a clip."""
    if sizes.timestep_conditioning:
        yield Tensor("timestep", "float32", ("batch",))
    for noise in sizes.noise_inputs:
        grid = (f"height_{noise.block}", f"width_{noise.block}")
        yield Tensor(noise.name, FLOAT, (noise.maps, *grid))


def check_feeds(stage: str, inputs: Sequence[Tensor], shapes: dict[str, tuple[int, ...]]) -> None:
    """Refuse feeds whose names or shapes break the table, naming the tensor and the axis.

    Raises:
        ValueError: a name is missing or unknown, a rank or a size differs, or two axes of one
            name have different sizes.
    """
    expected = {tensor.name for tensor in inputs}
    if expected != shapes.keys():
        missing, extra = sorted(expected - shapes.keys()), sorted(shapes.keys() - expected)
        raise ValueError(f"{stage}: inputs missing {missing}, unknown {extra}")
    sizes: dict[str, tuple[int, str]] = {}
    for tensor in inputs:
        shape = shapes[tensor.name]
        if len(shape) != len(tensor.axes):
            raise ValueError(f"{stage}: {tensor.name} has axes {tensor.axes}, got shape {shape}")
        for axis, size in zip(tensor.axes, shape, strict=True):
            wanted, where = (axis, "") if isinstance(axis, int) else sizes.get(axis, (size, ""))
            if size != wanted:
                source = f" as in {where}" if where else ""
                raise ValueError(
                    f"{stage}: {tensor.name} axis {axis!r} is {size}, wanted {wanted}{source}"
                )
            if isinstance(axis, str):
                sizes.setdefault(axis, (size, tensor.name))
