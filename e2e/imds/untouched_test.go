package imds

import (
	"encoding/binary"
	"net/http"
	"net/netip"
	"testing"
)

func TestExpected(t *testing.T) {
	daemon := http.Header{"User-Agent": {"imdsgate"}, "X-Aws-Ec2-Metadata-Token": {"t"}}
	sdk := http.Header{"User-Agent": {"aws-sdk-go-v2/1.47.7"}, "Amz-Sdk-Request": {"attempt=1; max=3"}}
	pod := http.Header{"User-Agent": {"curl/8"}}
	forwarded := http.Header{"User-Agent": {"imdsgate"}, "X-Forwarded-For": {"10.0.0.1"}}
	for _, c := range []struct {
		method, target string
		header         http.Header
		expected       Expected
		want           bool
	}{
		{"PUT", "/latest/api/token", daemon, Expected{}, true},
		{"PUT", "/latest/api/token", pod, Expected{}, false},
		{"PUT", "/latest/api/token", nil, Expected{}, false},
		{"PUT", "/latest/user-data", daemon, Expected{}, false},
		{"GET", "/latest/meta-data/placement/region", daemon, Expected{}, true},
		{"GET", "/latest/meta-data/placement/region/", daemon, Expected{}, true},
		{"GET", "/latest/meta-data/placement/region", forwarded, Expected{}, false},
		{"GET", "/latest/meta-data/placement/region?x", daemon, Expected{}, false},
		{"GET", "/latest/meta-data/placement/../iam/info", daemon, Expected{}, false},
		{"GET", "/latest/meta-data/iam/info", daemon, Expected{}, false},
		{"GET", "/latest/meta-data/iam/info", daemon, Expected{Paths: []string{"iam/info"}}, true},
		{"GET", "/latest/meta-data/iam/security-credentials/", sdk, Expected{}, false},
		{"GET", "/latest/meta-data/iam/security-credentials/node-role", sdk, Expected{NodeRole: true}, true},
		{"GET", "/latest/meta-data/iam/security-credentials/a/b", sdk, Expected{NodeRole: true}, false},
		{"GET", "/latest/user-data", daemon, Expected{NodeRole: true}, false},
		{"GET", "/2009-04-04/meta-data/placement/region", daemon, Expected{}, false},
	} {
		if got := c.expected.Permits(Request{Method: c.method, Target: c.target, Header: c.header}); got != c.want {
			t.Errorf("%s %s with %v and %+v: %v, want %v", c.method, c.target, c.header, c.expected, got, c.want)
		}
	}
}

func TestParse(t *testing.T) {
	v4 := func(protocol byte, payload ...byte) []byte {
		b := make([]byte, 20, 64)
		b[0], b[9] = 0x45, protocol
		copy(b[12:], []byte{10, 244, 1, 2})
		copy(b[16:], IPv4.AsSlice())
		return append(b, payload...)
	}
	v6 := func(protocol byte, payload ...byte) []byte {
		b := make([]byte, 40, 64)
		b[0], b[6] = 0x60, protocol
		source := netip.MustParseAddr("fd00:244:1::2").As16()
		copy(b[8:], source[:])
		copy(b[24:], IPv6.AsSlice())
		return append(b, payload...)
	}
	ports := binary.BigEndian.AppendUint16(binary.BigEndian.AppendUint16(nil, 40000), 80)
	one, two := netip.MustParseAddr("10.244.1.2"), netip.MustParseAddr("fd00:244:1::2")
	for name, c := range map[string]struct {
		packet []byte
		want   Packets
		ok     bool
	}{
		"tcp":           {v4(6, ports...), Packets{Source: one, Destination: IPv4, Protocol: "tcp", Port: 80}, true},
		"udp":           {v4(17, ports...), Packets{Source: one, Destination: IPv4, Protocol: "udp", Port: 80}, true},
		"icmp":          {v4(1, 8, 0), Packets{Source: one, Destination: IPv4, Protocol: "icmp"}, true},
		"sctp":          {v4(132, ports...), Packets{Source: one, Destination: IPv4, Protocol: "132"}, true},
		"cut off":       {v4(6), Packets{Source: one, Destination: IPv4, Protocol: "tcp"}, true},
		"tcp over IPv6": {v6(6, ports...), Packets{Source: two, Destination: IPv6, Protocol: "tcp", Port: 80}, true},
		"icmpv6":        {v6(58, 128, 0), Packets{Source: two, Destination: IPv6, Protocol: "icmp"}, true},
		"empty":         {nil, Packets{}, false},
		"short":         {make([]byte, 19), Packets{}, false},
	} {
		got, _, ok := parse(c.packet)
		if ok != c.ok || ok && got != c.want {
			t.Errorf("%s: %+v %v, want %+v %v", name, got, ok, c.want, c.ok)
		}
	}
}
