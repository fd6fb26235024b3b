package heir

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Connection is one end of an open TCP connection that no socket holds.
type Connection struct {
	Local, Remote netip.AddrPort
	Send, Receive uint32 // next sequence numbers
	MSS           uint32
	Options       uint8 // that were agreed on: has…
	SendScale     uint8
	ReceiveScale  uint8
	Timestamp     uint32
}

// Values of the kernel's enum in tcp.h and of its TCP options.
const (
	receiveQueue, sendQueue = 1, 2

	optionMSS, optionScale, optionSACK, optionTimestamps = 2, 3, 4, 8

	hasTimestamps, hasSACK, hasScale = 1, 2, 4
)

var errUnderWay = errors.New("the connection has data under way")

// Freeze takes the connection from its socket and closes that; the peer learns nothing. Everything that was written must have
// been answered. IPv4 alone; it needs CAP_NET_ADMIN.
func Freeze(c *net.TCPConn) (f Connection, err error) {
	f.Local, f.Remote = c.LocalAddr().(*net.TCPAddr).AddrPort(), c.RemoteAddr().(*net.TCPAddr).AddrPort()
	raw, err := c.SyscallConn()
	if err != nil {
		return f, err
	}
	if e := raw.Control(func(fd uintptr) { err = f.freeze(int(fd)) }); e != nil {
		err = e
	}
	return f, errors.Join(err, c.Close())
}

func (f *Connection) freeze(fd int) error {
	info, err := unix.GetsockoptTCPInfo(fd, unix.IPPROTO_TCP, unix.TCP_INFO)
	if err != nil {
		return fmt.Errorf("TCP_INFO: %w", err)
	}
	if info.Unacked != 0 {
		return errUnderWay
	}
	scales := (*[8]byte)(unsafe.Pointer(info))[6] // two bit fields, which the struct has no name for
	f.Options, f.SendScale, f.ReceiveScale = info.Options, scales&15, scales>>4
	s := options{fd: fd}
	s.set(unix.TCP_REPAIR, 1)
	s.set(unix.TCP_REPAIR_QUEUE, sendQueue)
	f.Send = s.get(unix.TCP_QUEUE_SEQ)
	s.set(unix.TCP_REPAIR_QUEUE, receiveQueue)
	f.Receive = s.get(unix.TCP_QUEUE_SEQ)
	f.MSS = s.get(unix.TCP_MAXSEG)
	f.Timestamp = s.get(unix.TCP_TIMESTAMP)
	return s.err
}

// Thaw makes a socket that goes on with the connection. The local address must be one of this network namespace.
func (f Connection) Thaw() (net.Conn, error) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("socket: %w", err)
	}
	file := os.NewFile(uintptr(fd), "connection") // net.FileConn makes a copy
	defer file.Close()
	s := options{fd: fd}
	s.err = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1)
	s.set(unix.TCP_REPAIR, 1)
	s.set(unix.TCP_REPAIR_QUEUE, sendQueue)
	s.set(unix.TCP_QUEUE_SEQ, f.Send)
	s.set(unix.TCP_REPAIR_QUEUE, receiveQueue)
	s.set(unix.TCP_QUEUE_SEQ, f.Receive)
	if s.err != nil {
		return nil, s.err
	}
	if err := unix.Bind(fd, &unix.SockaddrInet4{Addr: f.Local.Addr().As4(), Port: int(f.Local.Port())}); err != nil {
		return nil, fmt.Errorf("bind %s: %w", f.Local, err)
	}
	if err := unix.Connect(fd, &unix.SockaddrInet4{Addr: f.Remote.Addr().As4(), Port: int(f.Remote.Port())}); err != nil {
		return nil, fmt.Errorf("connect: %w", err)
	}
	var list []byte
	add := func(code, value uint32) {
		list = binary.NativeEndian.AppendUint32(binary.NativeEndian.AppendUint32(list, code), value)
	}
	add(optionMSS, f.MSS)
	if f.Options&hasScale != 0 {
		add(optionScale, uint32(f.SendScale)|uint32(f.ReceiveScale)<<16)
	}
	if f.Options&hasSACK != 0 {
		add(optionSACK, 0)
	}
	if f.Options&hasTimestamps != 0 {
		add(optionTimestamps, 0)
	}
	if err := unix.SetsockoptString(fd, unix.IPPROTO_TCP, unix.TCP_REPAIR_OPTIONS, string(list)); err != nil {
		return nil, fmt.Errorf("TCP_REPAIR_OPTIONS: %w", err)
	}
	s.set(unix.TCP_TIMESTAMP, f.Timestamp)
	s.set(unix.TCP_REPAIR, 0)
	if s.err != nil {
		return nil, s.err
	}
	if err := syscall.SetNonblock(fd, true); err != nil {
		return nil, err
	}
	return net.FileConn(file)
}

// options sets and gets TCP options until one fails.
type options struct {
	fd  int
	err error
}

func (s *options) set(option int, value uint32) {
	if s.err != nil {
		return
	}
	if err := unix.SetsockoptInt(s.fd, unix.IPPROTO_TCP, option, int(int32(value))); err != nil {
		s.err = fmt.Errorf("set TCP option %d: %w", option, err)
	}
}

func (s *options) get(option int) uint32 {
	if s.err != nil {
		return 0
	}
	value, err := unix.GetsockoptInt(s.fd, unix.IPPROTO_TCP, option)
	if err != nil {
		s.err = fmt.Errorf("get TCP option %d: %w", option, err)
	}
	return uint32(value)
}
