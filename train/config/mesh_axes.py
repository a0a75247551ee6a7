"""The sizes of the axes of a device mesh."""


def sizes(data_axis: int, fsdp_axis: int, num_devices: int) -> tuple[int, int]:
    """Returns the sizes of the axes "data" and "fsdp".

    A size of -1 stands for all devices that the other axis leaves; if both are -1, the
    first axis takes all devices. For 8 devices: (-1, 2) -> (4, 2), (-1, -1) -> (8, 1).

    Raises:
      ValueError: a size is 0 or below -1, or the product of the sizes is not the number
        of devices.
    """
    asked = data_axis, fsdp_axis
    if all(size == -1 or size > 0 for size in asked):
        if data_axis == -1:
            data_axis = num_devices // abs(fsdp_axis)
        if fsdp_axis == -1:
            fsdp_axis = num_devices // data_axis
        if data_axis * fsdp_axis == num_devices:
            return data_axis, fsdp_axis
    raise ValueError(f"{asked[0]} x {asked[1]} is not {num_devices}.")
