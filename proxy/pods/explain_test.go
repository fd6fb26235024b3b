package pods

import (
	"encoding/json"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"

	"github.com/imdsgate/imdsgate/proxy"
)

// What stands between a pod and credentials is its first bad step, with the fix; what is meant to be so is none.
func TestProblems(t *testing.T) {
	t.Parallel()
	a := newAPIServer(t)
	a.forbidden["list serviceaccounts"] = true // and so it stays unknown
	a.forbidden["watch serviceaccounts"] = true
	a.put(namespace("shop"), podOf("dark", "cart", []string{"10.0.0.1"}))
	h := start(t, a, testPolicy())
	poll(t, "the pod", func() bool { _, ok := h.Explain("shop", "dark"); return ok && h.Err() != nil })
	e, _ := h.Explain("shop", "dark")
	if s, ok := e.Problem(); !ok || s.About != "account" || !strings.Contains(s.Text, "the permission to ") || e.Reason != ReasonIncomplete {
		t.Errorf("without a permission: %+v", e)
	}

	a = newAPIServer(t)
	moved := podOf("moved", "none", []string{"10.0.0.4"})
	moved.Annotations = map[string]string{proxy.AnnotationRoleARN: roleARN}
	a.put(namespace("shop"), account("cart", proxy.AnnotationRoleARN, roleARN), account("bad", proxy.AnnotationRoleARN, "arn:oops"),
		account("none"), podOf("a", "cart", []string{"10.0.0.1"}), podOf("b", "bad", []string{"10.0.0.2"}), podOf("c", "none", []string{"10.0.0.3"}), moved,
		podOf("twin-1", "cart", []string{"10.0.0.9"}), podOf("twin-2", "cart", []string{"10.0.0.9"}), podOf("host", "cart", nil, hostNetwork))
	h = start(t, a, testPolicy()).synced(t)
	type row struct{ Reason, About, Fix string }
	got := map[string]row{}
	for _, e := range h.All() {
		s, _ := e.Problem()
		got[e.Name] = row{e.Reason, s.About, s.Fix}
	}
	fixAccount := "kubectl annotate serviceaccount -n shop "
	want := map[string]row{
		"a": {}, "b": {ReasonInvalid, "role", fixAccount + "bad eks.amazonaws.com/role-arn=arn:aws:iam::123456789012:role/ROLE --overwrite"},
		"c":     {Reason: ReasonNoRole},
		"moved": {ReasonMisplaced, "role", fixAccount + "none eks.amazonaws.com/role-arn=" + roleARN},
		"host":  {Reason: ReasonHostNetwork}, "twin-1": {"", "address", proxy.FixAmbiguousIP}, "twin-2": {"", "address", proxy.FixAmbiguousIP},
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("problems (-want +got):\n%s", d)
	}
	e, _ = h.Explain("shop", "twin-1")
	if s, _ := e.Problem(); !strings.Contains(s.Text, "shop/twin-1, shop/twin-2") {
		t.Errorf("the operator is not told who has the IP: %s", s)
	}
	// Each of the two is told in an Event, without the other's name.
	poll(t, "two Events", func() bool {
		var events []corev1.Event
		a.locked(func() { events = slices.Clone(a.events) })
		return slices.ContainsFunc(events, func(e corev1.Event) bool { return aboutIP(e, "twin-1", "twin-2") }) &&
			slices.ContainsFunc(events, func(e corev1.Event) bool { return aboutIP(e, "twin-2", "twin-1") })
	})
	// In JSON the steps are texts, as ever.
	var decoded struct{ Steps []string }
	b, err := json.Marshal(e)
	if err == nil {
		err = json.Unmarshal(b, &decoded)
	}
	if err != nil || len(decoded.Steps) != len(e.Steps) || decoded.Steps[0] != e.Steps[0].Text {
		t.Errorf("%s: %v", b, err)
	}
	if node, err := h.Locate(t.Context(), "shop", "a"); err != nil || !strings.Contains(e.Steps[0].Text, "to node "+node+",") || node == "" {
		t.Errorf("a is on %q, %v", node, err)
	}
	if _, err := h.Locate(t.Context(), "shop", "zzz"); err == nil || !strings.Contains(err.Error(), "no pod shop/zzz") {
		t.Errorf("zzz: %v", err)
	}
}

func aboutIP(e corev1.Event, pod, other string) bool {
	return e.Reason == proxy.EventAmbiguousIP && e.InvolvedObject.Name == pod && !strings.Contains(e.Message, other) &&
		strings.Contains(e.Message, "10.0.0.9") && strings.Contains(e.Message, proxy.FixAmbiguousIP)
}
