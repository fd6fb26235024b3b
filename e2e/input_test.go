package e2e_test

import (
	"context"
	"fmt"
	"net/http"
	"strings"
	"testing"
	"time"
	"unicode"

	"github.com/imdsgate/imdsgate/e2e/aws"
	"github.com/imdsgate/imdsgate/e2e/imds"
	"github.com/imdsgate/imdsgate/e2e/lab"
	"github.com/imdsgate/imdsgate/e2e/labtest"
)

// Whatever stands in an annotation, the pod is refused in words it can act on, an Event says the same, and nobody else notices.
func TestLabMalformedAnnotations(t *testing.T) {
	t.Parallel()
	n := labtest.Node(t, shared, lab.NodeOptions{IPv4Only: true})
	d := labtest.Daemon(t, n, "-pod-annotations")
	arn, err := n.Role("cart", aws.ActionListBuckets)
	if err != nil {
		t.Fatal(err)
	}
	const (
		allow  = "iam.amazonaws.com/allowed-roles"
		permit = "iam.amazonaws.com/permitted"
		all    = `["arn:aws:iam::123456789012:role/*"]`
	)
	long := strings.Repeat("x", 64<<10)
	for name, c := range map[string]struct {
		account, pod, namespace map[string]string
		status                  int
		event                   string // its reason; empty: none is promised
	}{
		"arn:oops":                 {account: map[string]string{roleAnnotation: "arn:oops"}, status: 403, event: "InvalidRoleARN"},
		"64 KiB":                   {account: map[string]string{roleAnnotation: "arn:aws:iam::123456789012:role/" + long}, status: 403, event: "InvalidRoleARN"},
		"control characters":       {account: map[string]string{roleAnnotation: "arn:aws:iam::123456789012:role/a\r\nX-Evil: 1\x00\x1b[31m"}, status: 403, event: "InvalidRoleARN"},
		"not a role":               {account: map[string]string{roleAnnotation: "arn:aws:iam::123456789012:user/eve"}, status: 403, event: "InvalidRoleARN"},
		"another service":          {account: map[string]string{roleAnnotation: "arn:aws:s3:::role/x"}, status: 403, event: "InvalidRoleARN"},
		"short name without base":  {account: map[string]string{roleAnnotation: "cart"}, status: 403, event: "InvalidRoleARN"},
		"template":                 {account: map[string]string{roleAnnotation: "{{ .Values.role }}"}, status: 403, event: "InvalidRoleARN"},
		"path tricks":              {account: map[string]string{roleAnnotation: "arn:aws:iam::123456789012:role/../../user-data"}, status: 403, event: "CredentialsFailed"}, // AWS allows it
		"session duration":         {account: map[string]string{roleAnnotation: arn, "imdsgate.dev/session-duration": "soon"}, status: 403, event: "InvalidAnnotation"},
		"session duration too big": {account: map[string]string{roleAnnotation: arn, "imdsgate.dev/session-duration": "9999999h"}, status: 403, event: "InvalidAnnotation"},
		"external ID":              {account: map[string]string{roleAnnotation: arn, "imdsgate.dev/external-id": "a b\n"}, status: 403, event: "InvalidAnnotation"},
		"not JSON":                 {account: map[string]string{roleAnnotation: arn}, namespace: map[string]string{allow: `["`}, status: 403, event: "RoleDenied"},
		"JSON of another kind":     {account: map[string]string{roleAnnotation: arn}, namespace: map[string]string{allow: `{"a":1}`}, status: 403, event: "RoleDenied"},
		"64 KiB of JSON":           {account: map[string]string{roleAnnotation: arn}, namespace: map[string]string{allow: strings.Repeat("[", 64<<10)}, status: 403, event: "RoleDenied"},
		"regexp broken":            {account: map[string]string{roleAnnotation: arn}, namespace: map[string]string{permit: "("}, status: 403, event: "RoleDenied"},
		"regexp matches a part":    {account: map[string]string{roleAnnotation: arn}, namespace: map[string]string{permit: "role/ca"}, status: 403, event: "RoleDenied"},
		"regexp huge":              {account: map[string]string{roleAnnotation: arn}, namespace: map[string]string{permit: "((((((((((x{100}){100}){100}){100})))))))"}, status: 403, event: "RoleDenied"},
		"pod annotation broken":    {pod: map[string]string{"iam.amazonaws.com/role": "arn:oops"}, status: 403, event: "InvalidRoleARN"},
		"pod session name":         {pod: map[string]string{"iam.amazonaws.com/role": arn, "iam.amazonaws.com/session-name": "a b\x00@" + long}, status: 200},
		"conflict":                 {account: map[string]string{roleAnnotation: arn}, pod: map[string]string{"iam.amazonaws.com/role": "arn:aws:iam::123456789012:role/other"}, status: 200, event: "RoleConflict"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			ctx := labtest.Context(t)
			namespace := shared.Unique("input")
			if c.namespace == nil {
				c.namespace = map[string]string{allow: all}
			}
			if err := shared.Namespace(ctx, namespace, c.namespace); err != nil {
				t.Fatal(err)
			}
			if err := shared.ServiceAccount(ctx, namespace, "app", c.account); err != nil {
				t.Fatal(err)
			}
			p := labtest.Pod(t, n, lab.PodSpec{Namespace: namespace, ServiceAccount: "app", Annotations: c.pod})
			var body string
			labtest.Eventually(t, func() error {
				status, b, err := ask(ctx, p, http.MethodGet, endpoint+roleList, nil)
				if body = b; err == nil && status != c.status {
					err = fmt.Errorf("the answer is %d, want %d: %s", status, c.status, b)
				}
				return err
			})
			if len(body) > 1100 || strings.ContainsFunc(body, unicode.IsControl) || c.status != 200 && !strings.Contains(body, " ") {
				t.Errorf("the answer has %d bytes or characters that break logs: %.200q", len(body), body)
			}
			if status, doc := get(t, p, roleList+"cart"); c.status != 200 && (status == 200 || accessKey.MatchString(doc)) {
				t.Errorf("the document is answered %d: %s", status, doc)
			}
			if c.event == "" {
				return
			}
			e, err := p.WaitEvent(ctx, c.event)
			if err != nil {
				t.Fatal(err)
			}
			if len(e.Message) > 1100 || strings.ContainsFunc(e.Message, unicode.IsControl) || e.Source.Component != "imdsgate" && e.ReportingController != "imdsgate" {
				t.Errorf("the Event is from %q and says %.200q", e.Source.Component, e.Message)
			}
			if c.status != 200 && e.Message != body {
				t.Logf("the Event says %q, the answer %q", e.Message, body)
			}
			if e.InvolvedObject.Kind != "Pod" && (c.event != "InvalidRoleARN" && c.event != "InvalidAnnotation") {
				t.Errorf("the Event is on a %s", e.InvolvedObject.Kind)
			}
		})
	}
	t.Cleanup(func() { // after all of them
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		defer cancel()
		if _, err := d.Ops(ctx, "/healthz"); err != nil {
			t.Errorf("the daemon is not well: %v", err)
		}
	})
}

// STS's refusal is an Event on the pod that says what to change, and a changed trust policy is enough.
func TestLabCredentialsFailed(t *testing.T) {
	t.Parallel()
	ctx := labtest.Context(t)
	n := labtest.Node(t, shared, lab.NodeOptions{})
	labtest.Daemon(t, n, "-issuer", "web-identity")
	shop := shared.Unique("shop")
	role := "arn:aws:iam::" + lab.Account + ":role/cart"
	if err := n.AWS.SetRole(aws.Role{ARN: role}); err != nil {
		t.Fatal(err)
	}
	if err := shared.ServiceAccount(ctx, shop, "cart", map[string]string{roleAnnotation: role}); err != nil {
		t.Fatal(err)
	}
	p := labtest.Pod(t, n, lab.PodSpec{Namespace: shop, ServiceAccount: "cart"})
	labtest.Eventually(t, func() error { return wantStatus(p, roleList, 403) })
	_, text := get(t, p, roleList)
	e, err := p.WaitEvent(ctx, "CredentialsFailed")
	if err != nil {
		t.Fatal(err)
	}
	for what, text := range map[string]string{"answer": text, "Event": e.Message} {
		for _, want := range []string{role, "AccessDenied", "trust policy", "system:serviceaccount:" + shop + ":cart"} {
			if !strings.Contains(text, want) {
				t.Errorf("the %s does not name %s: %s", what, want, text)
			}
		}
	}
	if _, err := n.Role("cart", aws.ActionListBuckets); err != nil {
		t.Fatal(err)
	}
	// A new pod of the account is reason enough to try again at once; otherwise the back-off decides.
	labtest.Eventually(t, func() error {
		_, doc, err := credentials(ctx, p)
		if err == nil {
			err = owned(n, doc, role)
		}
		return err
	})
	labtest.Untouched(t, n, imds.Expected{})
}
