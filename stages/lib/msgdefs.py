"""Definitions of messages that neither ROS 2 itself nor every recording brings along (sqlite3 before ROS 2 Iron has
none): type -> text, by package."""

VELODYNE = {
    "velodyne_msgs/msg/VelodynePacket": "builtin_interfaces/Time stamp\nuint8[1206] data\n",
    "velodyne_msgs/msg/VelodyneScan": "std_msgs/Header header\nvelodyne_msgs/VelodynePacket[] packets\n",
}
UDP = {"udp_msgs/msg/UdpPacket": "std_msgs/Header header\nstring address\nuint16 src_port\nuint8[] data\n"}

KNOWN = {**VELODYNE, **UDP}
