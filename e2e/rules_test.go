package e2e_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"regexp"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/imdsgate/imdsgate/e2e/imds"
	"github.com/imdsgate/imdsgate/e2e/lab"
	"github.com/imdsgate/imdsgate/e2e/labtest"
)

// Somebody flushes the rules again and again while pods ask: nothing escapes, and every time the rules are back within seconds.
func TestLabRulesFlushed(t *testing.T) {
	t.Parallel()
	ctx := labtest.Context(t)
	n := labtest.Node(t, shared, lab.NodeOptions{})
	d := labtest.Daemon(t, n, "-issuer", "web-identity")
	shop := shared.Unique("shop")
	role := serviceAccount(t, n, shop, "cart", "cart")
	p := labtest.Pod(t, n, lab.PodSpec{Namespace: shop, ServiceAccount: "cart"})
	served(t, n, p, role)
	repairs := func(what string) float64 {
		t.Helper()
		m, err := d.Metrics(ctx)
		if err != nil {
			t.Fatal(err)
		}
		return m[`imdsgate_repairs_total{what="`+what+`"}`]
	}
	// The guard stands while the redirect is gone: every packet of every kind may be tried.
	stop := hammer(ctx, []*lab.Pod{p})
	for _, flush := range []string{
		"iptables -t nat -F; ip6tables -t nat -F",
		"iptables -t nat -F IMDSGATE",
		"iptables -F INPUT",
		"iptables -t nat -F PREROUTING; iptables -t nat -F IMDSGATE; iptables -t nat -X IMDSGATE",
		"iptables-save | grep -v IMDSGATE | iptables-restore",
	} {
		soon(t, fmt.Sprintf("the repair after %q", flush), 3*time.Second, func() {
			before := repairs("redirect")
			if _, err := n.Run(ctx, "sh", "-c", flush); err != nil {
				t.Fatal(err)
			}
			labtest.Eventually(t, func() error {
				if now := repairs("redirect"); now <= before {
					return fmt.Errorf("after %q nothing was repaired", flush)
				}
				return nil
			})
		})
		labtest.Eventually(t, func() error { return freshStatus(ctx, p, 200) })
	}
	if err := stop(); err != nil {
		t.Error(err)
	}
	labtest.Untouched(t, n, imds.Expected{})

	// The redirect stands while the guard is gone: port 80 may be tried.
	var asking sync.WaitGroup
	asked, end := context.WithCancel(ctx)
	asking.Go(func() {
		for asked.Err() == nil {
			if err := freshStatus(ctx, p, 200); err != nil {
				t.Errorf("without the guard: %v", err)
				return
			}
		}
	})
	for _, remove := range []string{
		"ip rule del pref 0 to 169.254.169.254 unreachable",
		"ip rule del pref 0 to 169.254.169.254 iif lo goto 1",
		"ip rule del pref 1 nop",
		"ip -6 rule del pref 0 to fd00:ec2::254 unreachable",
	} {
		before := repairs("guard")
		if out, err := n.Run(ctx, "sh", "-c", remove); err != nil {
			t.Fatal(err, out)
		}
		labtest.Eventually(t, func() error {
			if now := repairs("guard"); now <= before {
				return fmt.Errorf("after %q nothing was repaired", remove)
			}
			return nil
		})
	}
	end()
	asking.Wait()
	if err := attack(ctx, p); err != nil {
		t.Error(err)
	}
	labtest.Untouched(t, n, imds.Expected{})
}

// freshStatus is wantStatus for the role list over a new connection.
func freshStatus(ctx context.Context, p *lab.Pod, want int) error {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	c, err := p.Dial(ctx, "tcp", "169.254.169.254:80")
	if err != nil {
		return err
	}
	defer c.Close()
	if err := c.SetDeadline(time.Now().Add(2 * time.Second)); err != nil {
		return err
	}
	fmt.Fprintf(c, "GET %s HTTP/1.1\r\nHost: 169.254.169.254\r\nConnection: close\r\n\r\n", roleList)
	b, err := io.ReadAll(c)
	if err != nil {
		return err
	}
	if !strings.HasPrefix(string(b), fmt.Sprintf("HTTP/1.1 %d ", want)) {
		return fmt.Errorf("the answer is %.100q, want %d", b, want)
	}
	return nil
}

// -cleanup leaves the node as it was before, foreign rules included.
func TestLabCleanup(t *testing.T) {
	t.Parallel()
	ctx := labtest.Context(t)
	n := labtest.Node(t, shared, lab.NodeOptions{Masquerade: true})
	if _, err := n.Run(ctx, "sh", "-ec", `
		for i in iptables ip6tables; do
			$i -t nat -A PREROUTING -p tcp --dport 81 -j REDIRECT --to-ports 82
			$i -t nat -A OUTPUT -p tcp --dport 83 -j ACCEPT
			$i -A INPUT -p tcp --dport 84 -j DROP
			$i -N KUBE-FOREIGN; $i -A FORWARD -j KUBE-FOREIGN
		done
		for f in -4 -6; do
			ip $f rule add pref 1 fwmark 0x7 lookup 107
			ip $f rule add pref 10 iif eth0 lookup 110
			ip $f rule add pref 99 fwmark 0x9 lookup main
		done`); err != nil {
		t.Fatal(err)
	}
	rules := func() string {
		t.Helper()
		out, err := n.Run(ctx, "sh", "-ec", "iptables-save; ip6tables-save; ip -4 rule; ip -6 rule")
		if err != nil {
			t.Fatal(err)
		}
		return regexp.MustCompile(`(?m)^#.*\n|\[\d+:\d+\]`).ReplaceAllString(out, "")
	}
	before := rules()
	d := labtest.Daemon(t, n, "-issuer", "web-identity")
	p := labtest.Pod(t, n, lab.PodSpec{})
	labtest.Eventually(t, func() error { return wantStatus(p, roleList, 404) })
	if rules() == before {
		t.Fatal("the daemon installed nothing")
	}
	if err := d.Stop(ctx); err != nil {
		t.Error(err)
	}
	if err := attack(ctx, p); err != nil {
		t.Error(err)
	}
	labtest.Untouched(t, n, imds.Expected{})
	for range 2 { // the second time there is nothing to do
		code, out, err := n.RunDaemon(ctx, lab.DaemonOptions{Flags: []string{"-cleanup"}})
		if err != nil || code != 0 {
			t.Fatalf("-cleanup ends with %d %v: %s", code, err, out)
		}
		if after := rules(); after != before {
			t.Errorf("-cleanup leaves\n%s\nwant\n%s", after, before)
		}
	}
	p.HTTP().CloseIdleConnections()
	if status, body := get(t, p, "/"); status != http.StatusUnauthorized {
		t.Errorf("after -cleanup a pod is answered %d %s, want the real endpoint's 401", status, body)
	}
}

// A second daemon takes over from the first without a refused request, and then one of them owns the rules.
func TestLabHandover(t *testing.T) {
	t.Parallel()
	ctx := labtest.Context(t)
	n := labtest.Node(t, shared, lab.NodeOptions{})
	shop := shared.Unique("shop")
	role := serviceAccount(t, n, shop, "cart", "cart")
	p := labtest.Pod(t, n, lab.PodSpec{Namespace: shop, ServiceAccount: "cart"})
	start := func(ops int) *lab.Daemon {
		t.Helper()
		d := labtest.Launch(t, n, lab.DaemonOptions{OpsPort: ops, Flags: []string{"-issuer", "web-identity", "-debug-addr", "",
			"-probe-socket", fmt.Sprintf("%s/probe-%d.sock", n.Dir(), ops)}})
		if err := d.WaitReady(ctx); err != nil {
			t.Fatal(err)
		}
		return d
	}
	to := func() string {
		t.Helper()
		out, err := n.Run(ctx, "iptables", "-t", "nat", "-S", "IMDSGATE")
		if err != nil {
			t.Fatal(err)
		}
		_, to, _ := strings.Cut(strings.TrimSpace(out), "--to-destination ")
		return to
	}
	first := start(9181)
	served(t, n, p, role)

	asking, end := context.WithCancel(ctx)
	defer end()
	var requests atomic.Int64
	var g errgroup.Group
	for range 4 { // over new connections
		g.Go(func() error {
			for asking.Err() == nil {
				if err := freshStatus(ctx, p, 200); err != nil {
					return err
				}
				requests.Add(1)
			}
			return nil
		})
	}
	g.Go(func() error { // over kept ones, as SDKs do
		for asking.Err() == nil {
			_, doc, err := credentials(ctx, p)
			if err == nil {
				err = owned(n, doc, role)
			}
			if err != nil {
				return err
			}
			requests.Add(1)
		}
		return nil
	})
	last := first
	for i := range 3 {
		before := to()
		next := start(9191 + i)
		if after := to(); after == before {
			t.Errorf("with the newcomer ready, pods are still sent to %s", after)
		}
		if err := last.Stop(ctx); err != nil {
			t.Error(err)
		}
		last = next
	}
	end()
	if err := g.Wait(); err != nil {
		t.Errorf("a request failed: %v", err)
	}
	t.Logf("%d requests during three handovers", requests.Load())

	// While both run, a flush is repaired by the owner alone.
	owner := start(9200)
	if _, err := n.Run(ctx, "iptables", "-t", "nat", "-F", "IMDSGATE"); err != nil {
		t.Fatal(err)
	}
	repairs := func(d *lab.Daemon) float64 {
		t.Helper()
		m, err := d.Metrics(ctx)
		if err != nil {
			t.Fatal(err)
		}
		return m[`imdsgate_repairs_total{what="redirect"}`]
	}
	labtest.Eventually(t, func() error {
		if repairs(owner) == 0 {
			return errors.New("the newcomer repairs nothing")
		}
		return freshStatus(ctx, p, 200)
	})
	if r := repairs(last); r != 0 {
		t.Errorf("the old daemon repaired, too: %v", r)
	}
	labtest.Untouched(t, n, imds.Expected{})
}
