package e2e_test

import (
	"testing"
	"time"

	"github.com/imdsgate/imdsgate/e2e/imds"
	"github.com/imdsgate/imdsgate/e2e/lab"
	"github.com/imdsgate/imdsgate/e2e/labtest"
)

// The API server goes while pods are served, and comes back. This test runs alone: the others share the API server.
func TestLabAPIServerGone(t *testing.T) {
	ctx := labtest.Context(t)
	serving, starting := labtest.Node(t, shared, lab.NodeOptions{}), labtest.Node(t, shared, lab.NodeOptions{})
	labtest.Daemon(t, serving, "-issuer", "web-identity")
	shop := shared.Unique("shop")
	role := serviceAccount(t, serving, shop, "cart", "cart")
	if _, err := starting.Role("cart"); err != nil {
		t.Fatal(err)
	}
	known := labtest.Pod(t, serving, lab.PodSpec{Namespace: shop, ServiceAccount: "cart"})
	waiting := labtest.Pod(t, starting, lab.PodSpec{Namespace: shop, ServiceAccount: "cart"})
	first := served(t, serving, known, role)

	shared.ControlPlane.StopAPIServer()
	back := false
	defer func() {
		if !back { // for the tests after this one
			if err := shared.ControlPlane.StartAPIServer(ctx); err != nil {
				t.Error(err)
			}
		}
	}()
	late := labtest.Launch(t, starting, lab.DaemonOptions{Flags: []string{"-issuer", "web-identity"}})
	if _, err := waitLog(ctx, late, "172.30.0.1:6443"); err != nil {
		t.Errorf("a daemon that starts without the API server does not say so: %v", err)
	}
	labtest.Eventually(t, func() error { return wantStatus(waiting, roleList, 503) })
	for range 5 {
		if _, doc, err := credentials(ctx, known); err != nil || doc.AccessKeyId != first.AccessKeyId {
			t.Errorf("without the API server, a known pod's cached credentials are not served: %v", err)
		}
		if err := wantStatus(waiting, roleList, 503); err != nil {
			t.Error(err)
		}
		soon(t, "a session token", 100*time.Millisecond, func() { token(t, waiting) })
	}
	for _, p := range []*lab.Pod{known, waiting} {
		if err := attack(ctx, p); err != nil {
			t.Error(err)
		}
	}

	if err := shared.ControlPlane.StartAPIServer(ctx); err != nil {
		t.Fatal(err)
	}
	back = true
	start := time.Now()
	if err := late.WaitReady(ctx); err != nil {
		t.Fatal(err)
	}
	t.Logf("ready %v after the API server", time.Since(start).Round(time.Millisecond))
	served(t, starting, waiting, role)
	fresh := labtest.Pod(t, serving, lab.PodSpec{Namespace: shop, ServiceAccount: "cart"})
	served(t, serving, fresh, role)
	t.Logf("a new pod was served %v after the API server", time.Since(start).Round(time.Millisecond))
	labtest.Untouched(t, serving, imds.Expected{})
	labtest.Untouched(t, starting, imds.Expected{})
}
