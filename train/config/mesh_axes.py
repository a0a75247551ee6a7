"""The sizes of the axes of a device mesh."""


def sizes(data_axis: int, fsdp_axis: int, num_devices: int) -> tuple[int, int]:
    """Returns the sizes of the axes "data" and "fsdp".

    A size of -1 takes all devices that are left; of two, the first takes all.

    Raises:
      ValueError: the axes do not take all devices.
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
