package hostile

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/imdsgate/imdsgate/e2e/lab"
)

// segment is a TCP segment of the length of its header, with data behind it.
func segment(src, dst netip.AddrPort, flags byte, seq, ack uint32, data ...byte) []byte {
	b := make([]byte, 20, 20+len(data))
	binary.BigEndian.PutUint16(b[0:], src.Port())
	binary.BigEndian.PutUint16(b[2:], dst.Port())
	binary.BigEndian.PutUint32(b[4:], seq)
	binary.BigEndian.PutUint32(b[8:], ack)
	b[12], b[13] = 5<<4, flags
	binary.BigEndian.PutUint16(b[14:], 64000)
	b = append(b, data...)
	s, d := src.Addr().AsSlice(), dst.Addr().AsSlice()
	pseudo := append(append(append([]byte{}, s...), d...), 0, unix.IPPROTO_TCP)
	pseudo = binary.BigEndian.AppendUint16(pseudo, uint16(len(b)))
	binary.BigEndian.PutUint16(b[16:], checksum(append(pseudo, b...)))
	return b
}

const synFlag = 2

func checksum(b []byte) uint16 {
	sum := uint32(0)
	for i := 0; i < len(b); i += 2 {
		w := uint32(b[i]) << 8
		if i+1 < len(b) {
			w |= uint32(b[i+1])
		}
		sum += w
	}
	for sum>>16 != 0 {
		sum = sum&0xffff + sum>>16
	}
	return ^uint16(sum)
}

// header is an IPv4 header for a payload; fragment holds the flags and the offset in units of eight bytes.
func header(src, dst netip.Addr, protocol byte, id, fragment uint16, options []byte, payload []byte) []byte {
	b := make([]byte, 20+len(options))
	b[0] = 4<<4 | byte(len(b)/4)
	binary.BigEndian.PutUint16(b[2:], uint16(len(b)+len(payload)))
	binary.BigEndian.PutUint16(b[4:], id)
	binary.BigEndian.PutUint16(b[6:], fragment)
	b[8], b[9] = 64, protocol
	copy(b[12:], src.AsSlice())
	copy(b[16:], dst.AsSlice())
	copy(b[20:], options)
	binary.BigEndian.PutUint16(b[10:], checksum(b))
	return append(b, payload...)
}

// header6 is an IPv6 header.
func header6(src, dst netip.Addr, next byte, payload []byte) []byte {
	b := make([]byte, 40)
	b[0] = 6 << 4
	binary.BigEndian.PutUint16(b[4:], uint16(len(payload)))
	b[6], b[7] = next, 64
	copy(b[8:], src.AsSlice())
	copy(b[24:], dst.AsSlice())
	return append(b, payload...)
}

// wire sends whole packets from inside a pod: the pod's own routing decides where, its own netfilter is passed by.
type wire struct{ v4, v6 int }

func newWire(t testing.TB, p *lab.Pod) wire {
	t.Helper()
	var w wire
	err := p.Net.Do(func() (err error) {
		if w.v4, err = unix.Socket(unix.AF_INET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_RAW); err != nil {
			return err
		}
		w.v6, err = unix.Socket(unix.AF_INET6, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_RAW)
		return err
	})
	if err != nil {
		t.Fatalf("open raw sockets: %v", err)
	}
	t.Cleanup(func() {
		_ = unix.Close(w.v4)
		_ = unix.Close(w.v6)
	})
	return w
}

// send retries while the device's queue is full. A packet that the pod's own kernel does not want counts as sent.
func (w wire) send(packet []byte) error {
	for range 1000 {
		var err error
		if packet[0]>>4 == 4 {
			err = unix.Sendto(w.v4, packet, 0, &unix.SockaddrInet4{Addr: [4]byte(packet[16:20])})
		} else {
			err = unix.Sendto(w.v6, packet, 0, &unix.SockaddrInet6{Addr: [16]byte(packet[24:40])})
		}
		if err != unix.ENOBUFS && err != unix.EAGAIN { //nolint:errorlint // an errno
			if err != nil {
				return fmt.Errorf("send a raw packet: %w", err)
			}
			return nil
		}
		time.Sleep(time.Millisecond)
	}
	return unix.ENOBUFS
}
