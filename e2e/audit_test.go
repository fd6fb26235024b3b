package e2e_test

import (
	"encoding/json"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/imdsgate/imdsgate/e2e/aws"
	"github.com/imdsgate/imdsgate/e2e/lab"
	"github.com/imdsgate/imdsgate/e2e/labtest"
)

// From what AWS knows of a call, as CloudTrail shows it (the access key and the session's ARN), the daemon's log leads to the
// service account and to every pod that had the key, as SECURITY.md says, and to no other.
func TestLabAudit(t *testing.T) {
	t.Parallel()
	n := labtest.Node(t, shared, lab.NodeOptions{})
	d := labtest.Daemon(t, n, "-issuer", "web-identity")
	shop := shared.Unique("shop")
	role := serviceAccount(t, n, shop, "cart", "team/cart")
	bill := serviceAccount(t, n, shop, "bill", "bill")
	pods := []*lab.Pod{
		labtest.Pod(t, n, lab.PodSpec{Namespace: shop, ServiceAccount: "cart"}),
		labtest.Pod(t, n, lab.PodSpec{Namespace: shop, ServiceAccount: "cart"}),
	}
	other := labtest.Pod(t, n, lab.PodSpec{Namespace: shop, ServiceAccount: "bill"})
	silent := labtest.Pod(t, n, lab.PodSpec{Namespace: shop, ServiceAccount: "cart"}) // has the right, and does not use it
	var key string
	for _, p := range append(pods, other, pods[0]) {
		if p == other {
			served(t, n, p, bill)
		} else {
			key = served(t, n, p, role).AccessKeyId
		}
	}

	record := aws.Call{}
	for _, c := range n.AWS.Calls() {
		if c.Issued == key {
			record = c
		}
	}
	owner, ok := n.AWS.Owner(key)
	if !ok || record.Issued == "" || !strings.HasSuffix(owner.ARN, "/"+record.SessionName) {
		t.Fatalf("AWS does not know the session of %s: %+v, %+v", key, record, owner)
	}
	type line struct {
		Msg, Namespace, Pod string
		UID                 string `json:"pod_uid"`
		ServiceAccount      string `json:"service_account"`
		IP                  string `json:"source_ip"`
		RoleARN             string `json:"role_arn"`
		SessionName         string `json:"session_name"`
		AccessKeyID         string `json:"access_key_id"`
		RequestID           string `json:"sts_request_id"`
	}
	var got []line
	for text := range strings.Lines(d.Log().String()) {
		var l line
		if strings.Contains(text, key) {
			if err := json.Unmarshal([]byte(text), &l); err != nil {
				t.Fatal(err)
			}
			got = append(got, l)
		}
	}
	// A request that waits may be answered before the cache has written its line.
	slices.SortStableFunc(got, func(a, b line) int { return -strings.Compare(a.Msg, b.Msg) })
	of := line{Namespace: shop, ServiceAccount: "cart", RoleARN: role, SessionName: record.SessionName, AccessKeyID: key}
	issued := of
	issued.Msg, issued.RequestID = "session issued", record.RequestID
	want := []line{issued}
	for _, p := range pods {
		given := of
		given.Msg, given.Pod, given.UID, given.IP = "session handed out", p.Name, string(p.UID), p.IPs[0].String()
		want = append(want, given)
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("what the log knows of %s (-want +got):\n%s", key, diff)
	}
	if strings.Contains(d.Log().String(), silent.Name+`"`) {
		t.Errorf("a pod that asked for nothing is in the log")
	}
}
