# SPDX-License-Identifier: Apache-2.0
"""Machines as files: what /proc, /sys, /etc and /var say on a Jetson of JetPack 6, on a Thor of JetPack 7, on a desktop and on a server.

Written after what owners of such machines and NVIDIA's and the kernel's documentation show of them (nv_tegra_release, nvpmodel's
status and conf, devfreq, soctherm_oc, ina3221, buddyinfo, swaps); no such machine was at hand.
"""

from pathlib import Path

NVPMODEL = """\
###########################
# POWER_MODEL DEFINITIONS #
###########################
# MAXN_SUPER is the NONE power model to release all constraints
< POWER_MODEL ID=0 NAME=15W >
CPU_ONLINE CORE_0 1
GPU MAX_FREQ 612000000
EMC MAX_FREQ 2133000000

< POWER_MODEL ID=1 NAME=25W >
GPU MAX_FREQ 918000000

< POWER_MODEL ID=2 NAME=MAXN_SUPER >
GPU MAX_FREQ -1

# mandatory section to configure the default power mode
< PM_CONFIG DEFAULT=1 >
"""
RAILS = {  # rail 7 is a sum that has no current of its own
    "in1_label": "VDD_IN", "in1_input": "5000", "curr1_input": "1200", "in2_label": "VDD_CPU_GPU_CV", "in2_input": "5000",
    "curr2_input": "400", "in3_label": "VDD_SOC", "in3_input": "5000", "curr3_input": "300", "in7_label": "sum of shunt voltages",
}  # fmt: skip


def _cores(count: int, least: int, most: int, now: int) -> dict[str, str]:
    values = {"scaling_min_freq": least, "scaling_max_freq": most, "cpuinfo_max_freq": most, "scaling_cur_freq": now}
    files = {f"sys/devices/system/cpu/cpu{i}/cpufreq/{name}": str(v) for i in range(count) for name, v in values.items()}
    return files | {f"sys/devices/system/cpu/cpu{i}/cpufreq/scaling_governor": "schedutil" for i in range(count)}


ORIN_NANO = {
    "proc/device-tree/model": "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super\0",
    "etc/nv_tegra_release": (
        "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64, DATE: Wed Jan  8 01:49:37 UTC 2025\n"
        "# KERNEL_VARIANT: oot\nTARGET_USERSPACE_LIB_DIR=nvidia\nTARGET_USERSPACE_LIB_DIR_PATH=usr/lib/aarch64-linux-gnu/nvidia\n"
    ),
    "etc/nvpmodel.conf": NVPMODEL,
    "var/lib/nvpmodel/status": "pmode:0001",
    "proc/meminfo": "MemTotal:        7802808 kB\nMemFree:         4210412 kB\nMemAvailable:    5606700 kB\nBuffers:           36060 kB\n",
    "proc/buddyinfo": (
        "Node 0, zone      DMA    130    119     86     51     21      6      2      3      1      3    131 \n"
        "Node 0, zone   Normal    604    438    305    188     76     34     15      9      6      8    811 \n"
    ),
    "proc/swaps": (
        "Filename\t\t\t\tType\t\tSize\t\tUsed\t\tPriority\n"
        "/dev/zram0                              partition\t650228\t\t0\t\t5\n"
        "/dev/zram1                              partition\t650228\t\t0\t\t5\n"
    ),
    "usr/local/cuda/version.json": '{"cuda": {"name": "CUDA SDK", "version": "12.6.11"}, "cuda_cudart": {"version": "12.6.68"}}',
    "usr/lib/aarch64-linux-gnu/libnvinfer.so.10": "",
    "usr/lib/aarch64-linux-gnu/libnvinfer.so.10.3.0": "",
    "usr/lib/aarch64-linux-gnu/libcudnn.so.9": "",
    "usr/lib/aarch64-linux-gnu/libcudnn.so.9.3.0": "",
    "proc/driver/nvidia/version": "NVRM version: NVIDIA UNIX Open Kernel Module for aarch64  540.4.0  Release Build  (buildbrain@mobile)\n",
    "proc/cpuinfo": "processor\t: 0\nBogoMIPS\t: 62.50\nFeatures\t: fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp asimddp\n",
    **_cores(6, 729600, 1344000, 1036800),
    "sys/class/devfreq/17000000.gpu/min_freq": "306000000",
    "sys/class/devfreq/17000000.gpu/max_freq": "918000000",
    "sys/class/devfreq/17000000.gpu/cur_freq": "612000000",
    "sys/class/devfreq/15340000.vic/cur_freq": "115200000",
    "sys/class/thermal/thermal_zone0/type": "cpu-thermal",
    "sys/class/thermal/thermal_zone0/temp": "48968",
    "sys/class/thermal/thermal_zone8/type": "tj-thermal",
    "sys/class/thermal/thermal_zone8/temp": "50812",
    "sys/class/thermal/cooling_device0/type": "pwm-fan",
    "sys/class/thermal/cooling_device0/cur_state": "2",
    "sys/class/thermal/cooling_device9/type": "gpu-throttle-alert",
    "sys/class/thermal/cooling_device9/cur_state": "0",
    "sys/class/hwmon/hwmon3/name": "soctherm_oc",
    "sys/class/hwmon/hwmon3/oc1_event_cnt": "0",
    "sys/class/hwmon/hwmon3/oc2_event_cnt": "0",
    "sys/class/hwmon/hwmon3/oc3_event_cnt": "7",
    **{f"sys/bus/i2c/drivers/ina3221/1-0040/hwmon/hwmon1/{name}": value for name, value in RAILS.items()},
}
THOR = {
    "proc/device-tree/model": "NVIDIA Jetson AGX Thor Developer Kit\0",
    "etc/nv_tegra_release": (
        "# R38 (release), REVISION: 4.0, GCID: 43443517, BOARD: generic, EABI: aarch64, DATE: Thu Dec 18 07:49:35 UTC 2025\n"
        "# KERNEL_VARIANT: oot\n"
    ),
    "etc/nvpmodel.conf": "< POWER_MODEL ID=0 NAME=MAXN >\nCPU_ONLINE CORE_0 1\n< POWER_MODEL ID=1 NAME=120W >\n",
    "var/lib/nvpmodel/status": "pmode:0000",
    "proc/meminfo": "MemTotal:       128790092 kB\nMemFree:        90000000 kB\nMemAvailable:   104857600 kB\n",
    "proc/buddyinfo": "Node 0, zone   Normal      4      3      0      1      0      0      0      0      0      0      0 \n",
    "proc/swaps": "Filename\t\t\t\tType\t\tSize\t\tUsed\t\tPriority\n/swap.img  file\t\t8388604\t0\t-2\n",
    "usr/local/cuda/version.json": '{"cuda": {"name": "CUDA SDK", "version": "13.0.0"}}',
    "usr/lib/aarch64-linux-gnu/libnvinfer.so.10.13.3": "",
    "usr/lib/aarch64-linux-gnu/libcudnn.so.9.12.0": "",
    "proc/driver/nvidia/version": "NVRM version: NVIDIA UNIX Open Kernel Module for aarch64  580.00  Release Build  (dvs-builder)\n",
    **_cores(14, 2601000, 2601000, 2601000),
    "sys/class/devfreq/gpu-gpc-0/min_freq": "1575000000",
    "sys/class/devfreq/gpu-gpc-0/max_freq": "1575000000",
    "sys/class/devfreq/gpu-gpc-0/cur_freq": "1575000000",
    "sys/class/devfreq/gpu-nvd-0/cur_freq": "1692000000",
    "sys/class/thermal/thermal_zone0/temp": "55100",
    "sys/class/thermal/cooling_device8/type": "gpu-throttle-alert",
    "sys/class/thermal/cooling_device8/cur_state": "1",
    "sys/class/hwmon/hwmon5/oc1_event_cnt": "0",
    "sys/class/hwmon/hwmon5/oc2_event_cnt": "8",
    "sys/class/hwmon/hwmon5/oc3_event_cnt": "813",
    "sys/class/hwmon/hwmon4/name": "ina238",
    "sys/class/hwmon/hwmon4/power1_input": "23400000",
    **{
        f"sys/bus/i2c/drivers/ina3221/2-0040/hwmon/hwmon3/{name}": value
        for name, value in {
            "in1_label": "VDD_GPU", "in1_input": "12000", "curr1_input": "200", "in2_label": "VDD_CPU_SOC_MSS", "in2_input": "12000",
            "curr2_input": "500", "in3_label": "VIN_SYS_5V0", "in3_input": "5000", "curr3_input": "1300",
        }.items()
    },
}  # fmt: skip
DESKTOP = {
    "proc/meminfo": "MemTotal:       65748928 kB\nMemFree:        30000000 kB\nMemAvailable:   55000000 kB\n",
    "proc/buddyinfo": "Node 0, zone   Normal   9600   5890   5684   7245   5619   3450   2110   1067   1091    471   1118 \n",
    "proc/swaps": "Filename\t\t\t\tType\t\tSize\t\tUsed\t\tPriority\n",
    "proc/driver/nvidia/version": (
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.65.06  Sun Jul 27 07:20:05 UTC 2025\n"
        "GCC version:  gcc version 13.3.0 (Ubuntu 13.3.0-6ubuntu2~24.04)\n"
    ),
    "proc/cpuinfo": "processor\t: 0\nmodel name\t: AMD Ryzen 9 5950X\nflags\t\t: fpu vme sse sse2 ssse3 fma avx avx2 bmi1\n",
    "usr/local/cuda/version.json": '{"cuda": {"name": "CUDA SDK", "version": "13.0.1"}}',
}
SERVER = {
    "proc/meminfo": "MemTotal:       24684084 kB\nMemFree:        12063160 kB\nMemAvailable:   23827880 kB\n",
    "proc/swaps": "Filename\t\t\t\tType\t\tSize\t\tUsed\t\tPriority\n",
    "proc/cpuinfo": "processor\t: 0\nmodel name\t: Intel(R) Xeon(R) Processor\nflags\t\t: fpu sse2 avx2 avx512f avx512_vnni amx_tile amx_int8\n",
}
MACHINES = {"orin-nano": ORIN_NANO, "thor": THOR, "desktop": DESKTOP, "server": SERVER}


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, content in files.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content)
    return root
