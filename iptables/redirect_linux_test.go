package iptables

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

func TestNewRefusesBadOptions(t *testing.T) {
	for _, o := range []Options{
		{GuardPriority: -1}, {GuardPriority: 32766},
		{Interface: "!"}, {Interface: "+"}, {Interface: "!+"}, {Interface: "!!eth0"}, {Interface: "a b"}, {Interface: "eth0\n-j ACCEPT"}, {Interface: "sixteen-letters-"}, {Interface: `e"`},
	} {
		if _, err := New(o); err == nil {
			t.Errorf("%+v is accepted", o)
		}
	}
	for _, o := range []Options{{}, {Guard: true, GuardPriority: 500}, {Interface: "eni+"}, {Interface: "!eth0"}, {Interface: "fifteen-letters"}} {
		r, err := New(o)
		if err != nil {
			t.Errorf("%+v: %v", o, err)
		} else if err := r.Verified(); (err == nil) == o.Guard {
			t.Errorf("%+v: Verified before anything was: %v", o, err)
		}
	}
}

func TestTargetsMustBeTheNodes(t *testing.T) {
	for text, ok := range map[string]bool{
		"127.0.0.1:8254": false, "[::1]:8254": false, "0.0.0.0:8254": false, "169.254.169.254:8254": false, "[fd00:ec2::254]:80": false,
		"192.0.2.7:8254": false, "[fe80::1]:8254": false, "224.0.0.1:8254": false,
	} {
		if _, err := checkTargets([]netip.AddrPort{netip.MustParseAddrPort(text)}); (err == nil) != ok {
			t.Errorf("%s: %v", text, err)
		}
	}
	if _, err := checkTargets(nil); err == nil || !strings.Contains(err.Error(), "-host-ip") {
		t.Errorf("no target: %v", err)
	}
	if _, err := checkTargets([]netip.AddrPort{{}}); err == nil {
		t.Error("the zero target is accepted")
	}
	if err := onNode(node4, []netip.Addr{node6, node4}); err != nil {
		t.Error(err)
	}
}

func TestNoIptablesNamesTheFix(t *testing.T) {
	t.Setenv("PATH", t.TempDir())
	_, err := probe(t.Context(), ipv6, "ip6tables")
	if err == nil || !strings.Contains(err.Error(), "apt-get install iptables") {
		t.Errorf("got %v", err)
	}
	r, err := New(Options{})
	must(t, err)
	var text string
	for _, f := range r.Check(t.Context()) {
		text += f.Text
	}
	if !strings.Contains(text, "apt-get install iptables") {
		t.Errorf("Check: %s", text)
	}
	if found := backends(t.Context(), ipv4); len(found) != 0 {
		t.Errorf("found %v", found)
	}
}

// complete is a listing as the table wants it.
func complete(w table) listing {
	return listing{parent: []string{w.jump()}, chain: slices.Clone(w.rules), exists: true}
}

func TestDefects(t *testing.T) {
	d := redirect{iface: "!eth0", to: gate4}
	nat := d.tables()[1]
	for _, tc := range []struct {
		name   string
		change func(*listing)
		want   string // in the text
		is     error
	}{
		{"whole", func(*listing) {}, "", nil},
		{"as legacy prints it", func(l *listing) {
			l.parent = []string{`-A PREROUTING -m comment --comment "imdsgate" -j IMDSGATE`}
			l.chain = []string{"-A IMDSGATE ! -i eth0 -d 169.254.169.254 -p tcp -m tcp --dport 80 -j DNAT --to-destination 10.0.0.1:8254"}
		}, "", nil},
		{"others behind", func(l *listing) { l.parent = append(l.parent, "-A PREROUTING -j KUBE-SERVICES") }, "", nil},
		{"no chain", func(l *listing) { *l = listing{} }, "chain IMDSGATE is missing", nil},
		{"empty", func(l *listing) { l.chain = nil }, "holds", nil},
		{"another target", func(l *listing) { l.chain[0] = strings.Replace(l.chain[0], "8254", "8255", 1) }, "8255", nil},
		{"not negated", func(l *listing) { l.chain[0] = strings.Replace(l.chain[0], "! -i", "-i", 1) }, "holds", nil},
		{"one more", func(l *listing) { l.chain = append(l.chain, "-A IMDSGATE -j RETURN") }, "holds", nil},
		{"twice", func(l *listing) { l.chain = append(l.chain, l.chain[0]) }, "holds", nil},
		{"no jump", func(l *listing) { l.parent = []string{"-A PREROUTING -j KUBE-SERVICES"} }, "no jump", nil},
		{"two jumps", func(l *listing) { l.parent = append(l.parent, l.parent[0]) }, "one plain jump", nil},
		{"narrow jump", func(l *listing) { l.parent[0] = "-A PREROUTING -i eth7 -m comment --comment imdsgate -j IMDSGATE" }, "one plain jump", nil},
		{"goto", func(l *listing) { l.parent[0] = "-A PREROUTING -m comment --comment imdsgate -g IMDSGATE" }, "one plain jump", nil},
		{"behind", func(l *listing) { l.parent = append([]string{"-A PREROUTING -j cali-PREROUTING"}, l.parent...) }, "cali", errDisplaced},
		{"behind a taker", func(l *listing) {
			l.parent = append([]string{"-A PREROUTING -d 169.254.169.254/32 -p tcp -j DNAT --to-destination 10.0.0.1:8181"}, l.parent...)
		}, "8181", errTaken},
	} {
		have := complete(nat)
		tc.change(&have)
		err := nat.defect(have, ipv4.endpoint())
		switch {
		case tc.want == "" && err != nil:
			t.Errorf("%s: %v", tc.name, err)
		case tc.want != "" && (err == nil || !strings.Contains(err.Error(), tc.want)):
			t.Errorf("%s: got %v, want %q in it", tc.name, err, tc.want)
		case tc.is != nil && !errors.Is(err, tc.is), tc.is == nil && err != nil && onlyOrder([]error{err}):
			t.Errorf("%s: got %v, want it to be %v", tc.name, err, tc.is)
		}
	}
}

// What iptables-restore is given, for every start.
func TestRestoreGolden(t *testing.T) {
	var b strings.Builder
	section := func(name string) { b.WriteString("## " + name + "\n") }
	for _, f := range families() {
		d := redirect{to: gate4}
		if f == ipv6 {
			d = redirect{iface: "eni+", to: gate6}
		}
		section(f.String() + ": virgin node")
		for _, w := range d.tables() {
			b.WriteString(w.restore(listing{}))
		}
	}
	d := redirect{to: next4, previous: gate4}
	section("a new instance beside the old one: jumps stay, so the change is one commit a table")
	for _, w := range d.tables() {
		b.WriteString(w.restore(complete(w)))
	}
	nat := d.tables()[1]
	section("jumps in the wrong places and of other kinds")
	b.WriteString(nat.restore(listing{exists: true, parent: []string{
		"-A PREROUTING -j KUBE-SERVICES", nat.jump(), `-A PREROUTING -i eth7 -m comment --comment "x y" -g IMDSGATE`,
	}}))
	section("removal")
	for _, w := range ourTables() {
		b.WriteString(w.remove(listing{exists: true, parent: []string{"-A " + w.parent + " -j CANARY", w.jump()}}))
		if lines := w.remove(listing{parent: []string{"-A " + w.parent + " -j IMDSGATE2", "-A " + w.parent + " -m comment --comment IMDSGATE -j X"}}); lines != "" {
			t.Errorf("nothing of ours, yet: %s", lines)
		}
	}
	golden(t, "restore.txt", b.String())
}

func TestTargetOfAListing(t *testing.T) {
	for _, to := range []netip.AddrPort{gate4, gate6} {
		d := redirect{iface: "eni+", to: to, previous: netip.AddrPortFrom(to.Addr(), 8255)}
		tables := d.tables()
		if got := complete(tables[1]).target(); got != to {
			t.Errorf("got %s, want %s", got, to)
		}
		if d := cmp.Diff([]string{to.String(), to.String(), d.previous.String(), d.previous.String()}, text(lockedPorts(complete(tables[0])))); d != "" {
			t.Error(d)
		}
	}
	if got := (listing{chain: []string{"-A IMDSGATE -j DNAT --to-destination nonsense", "-A IMDSGATE --to-destination"}}).target(); got.IsValid() {
		t.Errorf("got %s", got)
	}
}

func text(all []netip.AddrPort) (s []string) {
	for _, a := range all {
		s = append(s, a.String())
	}
	return s
}

func FuzzCanonical(f *testing.F) {
	f.Add(`-A X ! -i "eth 0" -d 1.2.3.4/32 -m tcp ! --dport 80 -j DNAT`)
	f.Add("! ! -")
	f.Fuzz(func(t *testing.T, rule string) {
		if !sameRule(rule, rule) {
			t.Error("a rule differs from itself")
		}
		l := listing{parent: []string{rule}, chain: []string{rule}, exists: true}
		nat := redirect{to: gate4}.tables()[1]
		_, _, _ = nat.defect(l, ipv4.endpoint()), nat.restore(l), l.target()
		_, _ = foreignNAT(ipv4, rule), lockedPorts(l)
	})
}

func TestForeignNAT(t *testing.T) {
	for rule, want := range map[string]bool{
		"-A PREROUTING -d 169.254.169.254/32 -i eni+ -p tcp -m tcp --dport 80 -j DNAT --to-destination 10.0.0.1:8181": true, // kube2iam, kiam
		"-A aad-metadata -d 169.254.169.254/32 -p tcp -m tcp --dport 80 -j REDIRECT --to-ports 2579":                  true,
		"-A IMDSGATE -d 169.254.169.254/32 -p tcp -m tcp --dport 80 -j DNAT --to-destination 10.0.0.1:8254":           false,
		"-A PREROUTING -d 169.254.169.254/32 -j CANARY":                                                               false,
		"-A PREROUTING ! -d 169.254.169.254/32 -j DNAT --to-destination 10.0.0.1":                                     false,
		"-A KUBE-SEP-X -p tcp -j DNAT --to-destination 10.0.0.9:80":                                                   false,
	} {
		if foreignNAT(ipv4, rule) != want {
			t.Errorf("%s: got %v", rule, !want)
		}
	}
}

func TestEscapedConnections(t *testing.T) {
	e := escaped{ipv4.endpoint(), []netip.AddrPort{gate4, {}}, []netip.Addr{node4}}
	ip := func(s string) net.IP { return net.ParseIP(s).To4() }
	for _, tc := range []struct {
		src, dst, answers string
		port              uint16
		want              bool
	}{
		{"10.244.1.2", "169.254.169.254", "169.254.169.254", 80, true},  // straight to the endpoint
		{"10.244.1.2", "169.254.169.254", "10.0.0.1", 8181, true},       // to kube2iam
		{"10.244.1.2", "169.254.169.254", "10.0.0.1", 8254, false},      // to us
		{"10.0.0.1", "169.254.169.254", "169.254.169.254", 80, false},   // the node's own
		{"10.244.1.2", "10.96.0.1", "10.0.0.1", 443, false},             // something else
		{"10.244.1.2", "169.254.169.254", "169.254.169.254", 123, true}, // another port
	} {
		flow := &netlink.ConntrackFlow{
			Forward: netlink.IPTuple{SrcIP: ip(tc.src), DstIP: ip(tc.dst)}, Reverse: netlink.IPTuple{SrcIP: ip(tc.answers), SrcPort: tc.port},
		}
		if got := e.MatchConntrackFlow(flow); got != tc.want {
			t.Errorf("%+v: got %v", tc, got)
		}
	}
	if e.MatchConntrackFlow(&netlink.ConntrackFlow{}) {
		t.Error("an empty flow matches")
	}
}

func TestOwnership(t *testing.T) {
	dir := t.TempDir()
	a, b := &owner{dir: dir}, &owner{dir: dir}
	take := func(o *owner) { t.Helper(); must(t, o.locked(t.Context(), o.take)) }
	take(a)
	must(t, a.check())
	take(b)
	must(t, b.check())
	if err := a.check(); !errors.Is(err, errSuperseded) {
		t.Errorf("the older: %v", err)
	}
	take(a)
	if err := b.check(); !errors.Is(err, errSuperseded) {
		t.Errorf("superseded again: %v", err)
	}
	owns := a
	for what, spoil := range map[string]func(file string) error{
		"lost":     os.Remove,
		"emptied":  func(file string) error { return os.Truncate(file, 0) },
		"nonsense": func(file string) error { return os.WriteFile(file, []byte("nonsense"), 0o600) },
		"negative": func(file string) error { return os.WriteFile(file, []byte("-1"), 0o600) },
		"the last": func(file string) error { return os.WriteFile(file, []byte("18446744073709551615"), 0o600) },
	} {
		must(t, spoil(filepath.Join(dir, generationFile)))
		must(t, owns.check()) // makes nobody the owner: who has the rules goes on
		newcomer := &owner{dir: dir}
		take(newcomer)
		if err := owns.check(); !errors.Is(err, errSuperseded) {
			t.Errorf("%s, then taken over: %v", what, err)
		}
		owns = newcomer
	}
	// One at a time, and a holder does not outlast the other's context.
	err := a.locked(t.Context(), func() error {
		ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
		defer cancel()
		if err := b.locked(ctx, func() error { return nil }); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("locked twice: %v", err)
		}
		return nil
	})
	must(t, err)
	// The lock is not followed to where a link leads.
	must(t, os.Remove(filepath.Join(dir, lockFile)))
	must(t, os.Symlink(filepath.Join(dir, "elsewhere"), filepath.Join(dir, lockFile)))
	if err := a.locked(t.Context(), a.take); err == nil || !strings.Contains(err.Error(), "-state-dir") {
		t.Errorf("a link for a lock: %v", err)
	}
	alone := &owner{}
	take(alone)
	must(t, alone.check())
}

// Many events come to one check, then at most one a spacing; without events there is one every interval.
func TestLoopCoalesces(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		start := time.Now()
		var at []time.Duration
		s := make(signal, 1)
		done := make(chan struct{})
		go func() {
			loop(ctx, s, time.Second, 30*time.Second, func(context.Context) { at = append(at, time.Since(start)) })
			close(done)
		}()
		time.Sleep(500 * time.Millisecond)
		for range 100 {
			s.raise()
		}
		time.Sleep(5 * time.Second) // one at 1 s, none after it
		s.raise()                   // at once: 5.5 s
		time.Sleep(35 * time.Second)
		cancel()
		<-done
		if d := cmp.Diff([]time.Duration{0, time.Second, 5500 * time.Millisecond, 36500 * time.Millisecond}, at); d != "" {
			t.Errorf("checks (-want +got):\n%s", d)
		}
	})
}

func TestEventsAboutUs(t *testing.T) {
	attr := func(kind int, s string) *nl.RtAttr { return nl.NewRtAttr(kind, nl.ZeroTerminated(s)) }
	for _, tc := range []struct {
		kind  uint16
		attrs []*nl.RtAttr
		want  bool
	}{
		{unix.NFT_MSG_DELRULE, []*nl.RtAttr{attr(1, "nat"), attr(2, chainName)}, true},
		{unix.NFT_MSG_NEWRULE, []*nl.RtAttr{attr(1, "nat"), attr(2, "PREROUTING")}, true},
		{unix.NFT_MSG_NEWRULE, []*nl.RtAttr{attr(1, "filter"), attr(2, "INPUT")}, true},
		{unix.NFT_MSG_NEWRULE, []*nl.RtAttr{attr(1, "nat"), attr(2, "KUBE-SVC-X")}, false},
		{unix.NFT_MSG_NEWRULE, []*nl.RtAttr{attr(1, "kube-proxy"), attr(2, "PREROUTING")}, false},
		{unix.NFT_MSG_DELCHAIN, []*nl.RtAttr{attr(1, "nat"), attr(3, chainName)}, true},
		{unix.NFT_MSG_NEWCHAIN, []*nl.RtAttr{attr(1, "nat"), attr(3, "KUBE-SEP-X")}, false},
		{unix.NFT_MSG_DELTABLE, []*nl.RtAttr{attr(1, "nat")}, true},
		{unix.NFT_MSG_DELTABLE, []*nl.RtAttr{attr(1, "kube-proxy")}, false},
		{unix.NFT_MSG_NEWSETELEM, []*nl.RtAttr{attr(1, "nat")}, false},
		{unix.NFT_MSG_NEWGEN, nil, false},
	} {
		data := make([]byte, nl.SizeofNfgenmsg)
		for _, a := range tc.attrs {
			data = append(data, a.Serialize()...)
		}
		m := syscall.NetlinkMessage{Header: syscall.NlMsghdr{Type: unix.NFNL_SUBSYS_NFTABLES<<8 | tc.kind}, Data: data}
		if got := aboutUs(m); got != tc.want {
			t.Errorf("type %d, %s: got %v", tc.kind, strconv.Quote(string(data)), got)
		}
	}
	if !aboutUs(syscall.NetlinkMessage{}) {
		t.Error("lost events must be looked into")
	}
}

// A change of ownership is an event.
func TestOwnershipIsWatched(t *testing.T) {
	dir := t.TempDir()
	ctx, cancel := context.WithCancel(t.Context())
	events, done := make(chan struct{}), make(chan error)
	go func() { done <- watchDir(ctx, dir, func() { events <- struct{}{} }) }()
	<-events // the watch is on
	o := &owner{dir: dir}
	must(t, o.locked(t.Context(), o.take))
	<-events
	cancel()
	must(t, <-done)
	if err := watchDir(t.Context(), filepath.Join(dir, "missing"), func() {}); err == nil {
		t.Error("a missing directory is watched")
	}
}
